"""Calls of scans and steps as values, which the public functions check once and pass on unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.transforms import records_gradient


class ScanSettings(NamedTuple):
    """Settings of a scan or step.

    Attributes:
        reverse: run from the last token to the first.
        scale: factor of the outputs.
        q_activation: "silu", "sigmoid" or "none", applied to q.
        v_activation: "none" or "silu", applied to v.
        min_log_decay: floor under the log decay of a tied gate, or None.
    """

    reverse: bool = False
    scale: float = 1.0
    q_activation: str = "none"
    v_activation: str = "none"
    min_log_decay: float | None = None


class ScanCall(NamedTuple):
    """Operands and settings of a scan, or of a step, whose tensors have no T axis.

    Attributes:
        q: [B, T, H, K], in the model's dtype like f, k and v.
        f: [B, T, H, K], pre-activation of the forget gate or, beside a key, the log decay in the state dtype.
        k: [B, T, H, K], the key of `gated_scan`, or None for the tied key of `hgrn2_scan`.
        v: [B, T, H, V].
        lower_bound: [H, K] in the state dtype, or None for 0.
        initial_state: [N, H, K, V] in the state dtype, or None for zeros.
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, or None.
        settings: the settings.
    """

    q: Tensor
    f: Tensor
    k: Tensor | None
    v: Tensor
    lower_bound: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    settings: ScanSettings

    def num_packed(self) -> int:
        """Return the number of packed sequences, 0 when nothing is packed."""
        return 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def num_states(self) -> int:
        """Return N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def state_shape(self) -> tuple[int, ...]:
        """Return [N, H, K, V]."""
        return (self.num_states(), *self.q.shape[-2:], self.v.shape[-1])

    def new_states(self) -> Tensor:
        """Return a copy of the initial states, contiguous; zeros if there are none."""
        if self.initial_state is not None:
            return self.initial_state.clone(memory_format=torch.contiguous_format)
        return torch.zeros(self.state_shape(), dtype=state_dtype(self.q), device=self.q.device)

    def needs_gradient(self) -> bool:
        """Return whether autograd records the call."""
        return torch.is_grad_enabled() and any(x is not None and records_gradient(x) for x in self[:-1])

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments of `SCHEMA`, in order."""
        return (*self[:-1], *self.settings)

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> ScanCall:
        """Return the call with these arguments of `SCHEMA`."""
        return cls._make((*flat[:NUM_TENSORS], ScanSettings(*flat[NUM_TENSORS:])))


class ScanGradients(NamedTuple):
    """Gradients of the tensors of a `ScanCall`; None for tensors that are missing or need no gradient."""

    q: Tensor | None
    f: Tensor | None
    k: Tensor | None
    v: Tensor | None
    lower_bound: Tensor | None
    initial_state: Tensor | None


class CallTraits(NamedTuple):
    """Traits of a call that decide which backends can run it.

    Attributes:
        device: device of the inputs.
        dtype: dtype of q.
        k_width: K.
        v_width: V.
        batch: B.
        is_tied: whether the key is tied to the forget gate, as in `hgrn2_scan`.
        is_step: whether the call is one token of each sequence.
    """

    device: torch.device
    dtype: torch.dtype
    k_width: int
    v_width: int
    batch: int = 1
    is_tied: bool = True
    is_step: bool = False


def traits_of(call: ScanCall, is_step: bool = False) -> CallTraits:
    """Return the traits of a call."""
    q = call.q
    return CallTraits(q.device, q.dtype, q.shape[-1], call.v.shape[-1], q.shape[0], call.k is None, is_step)


def state_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of states and lower bounds: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


NUM_TENSORS = len(ScanCall._fields) - 1
_SCHEMA_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "bool": "bool", "float": "float", "float | None": "float?",
    "str": "str",
}  # fmt: skip
_FIELDS = {name: ScanCall.__annotations__[name] for name in ScanCall._fields[:NUM_TENSORS]} | {
    name: ScanSettings.__annotations__[name] for name in ScanSettings._fields
}
# the flat arguments of a call in the language of torch's schemas
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[getattr(hint, '__forward_arg__', hint)]} {name}" for name, hint in _FIELDS.items())
