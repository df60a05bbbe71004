"""The protocol of token mixers, and the context of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hgrn2.constraints import check_fields
from hgrn2.nn.parameters import InitialValues, parameter_roles

MixerState = dict[str, Tensor]
Memory = Literal["state", "window", "tokens"]


@dataclass(frozen=True)
class Context:
    """Inputs of a forward pass beside the hidden states; made once, and narrowed to each layer.

    Attributes:
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
        mask: [B, T] bool, False where a token is padding, or None.
        keep_state: whether the new state is wanted.
        is_step: whether x is one token after a state: a mixer may take a faster form.
        lower_bound: [D] float32 in [0, 1), the bound of this layer's gates; None for 0, and for mixers that do not use
            lower bounds.
        earlier: features that earlier layers returned, the nearest last; at most `Mixer.num_earlier`.
    """

    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    keep_state: bool = True
    is_step: bool = False
    lower_bound: Tensor | None = None
    earlier: tuple[MixerState, ...] = ()

    def for_layer(self, lower_bound: Tensor | None, earlier: tuple[MixerState, ...]) -> Context:
        """Returns the context of one layer."""
        if lower_bound is None and not earlier:
            return self
        return Context(self.cu_seqlens, self.mask, self.keep_state, self.is_step, lower_bound, earlier)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Context:
        """Moves the tensors to a device, as Accelerate asks of a layer's arguments."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return Context(
            move(self.cu_seqlens), move(self.mask), self.keep_state, self.is_step, move(self.lower_bound),
            tuple({k: x.to(device, non_blocking=non_blocking) for k, x in some.items()} for some in self.earlier),
        )  # fmt: skip


@dataclass(frozen=True)
class StateSpec:
    """Shape and dtype of one tensor of a mixer's state.

    Zeros (False for bool) stand for the start of a sequence: a mixer encodes its state so.

    Attributes:
        shape: of one sequence; the tensor has an axis of N sequences before it.
        dtype: of the tensor.
        grows: whether the first axis of `shape` grows with the tokens that are read; `shape` has its length at the
            start, and new places come last.
        limit: most places of an axis that grows; None for no limit.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: bool = False
    limit: int | None = None

    def zeros(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Makes the tensor at the start of some sequences."""
        return torch.zeros((batch_size, *self.shape), device=device, dtype=self.dtype)

    def matches(self, x: Tensor) -> bool:
        """Says whether a tensor [N, ...] has this shape."""
        shape = x.shape[1:]
        if self.grows and len(shape) == len(self.shape):
            return tuple(shape[1:]) == self.shape[1:]
        return tuple(shape) == self.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence at its start."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def bytes_per_token(self) -> int:
        """Bytes by which a sequence grows with a token, up to the limit."""
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel() if self.grows else 0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of recurrent states beside inputs of a dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MixerOptions:
    """Options of a mixer, as a configuration names them; each mixer has a frozen dataclass derived from this one."""

    def __post_init__(self) -> None:
        check_fields(self, "options")
        self.check()

    def check(self) -> None:
        """Checks values against each other; types have been checked.

        Raises:
            UserError: a value that does not fit; the message begins with the option's name.
        """

    def check_width(self, hidden_size: int) -> None:
        """Checks the options against the width of a model.

        Raises:
            UserError: they do not fit.
        """


class Mixer(nn.Module):
    """Base of token mixers: mixes the tokens of x [B, T, D] along time, and carries a state from call to call.

    A mixer is registered with `hgrn2.nn.mixers.register_mixer`, and made of the model's width and its options:
    `cls(hidden_size, **options)`.

    Attributes:
        uses_lower_bound: whether `Context.lower_bound` is wanted.
        can_pack: whether `Context.cu_seqlens` is followed.
        can_pad: whether `Context.mask` is followed.
        num_earlier: how many earlier layers' features are wanted in `Context.earlier`.
        backend: name of the operators' backend, or "auto"; set after the mixer is made.
    """

    uses_lower_bound: ClassVar[bool] = False
    can_pack: ClassVar[bool] = False
    can_pad: ClassVar[bool] = False
    num_earlier: int = 0
    backend: str = "auto"

    def forward(self, x: Tensor, state: MixerState | None, context: Context) -> Any:
        """Mixes tokens.

        Args:
            x: [B, T, D].
            state: of the tokens before x, by the names of `state_spec`; None at a start.
            context: what the pass says about x.

        Returns:
            y [B, T, D] and the new state ({} unless `context.keep_state`); as a third value, if there are any, features
            for the layers after it.
        """
        raise NotImplementedError

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Returns the tensors of the state by name.

        Args:
            dtype: of the layer's inputs.
        """
        raise NotImplementedError

    def reset_parameters(self, init: InitialValues) -> None:
        """Sets every parameter to its initial value.

        Args:
            init: standard deviations, the layer's place in the model and the source of random numbers.
        """
        raise NotImplementedError

    def flops(self, seq_len: int) -> int:
        """Returns multiplications and additions a token beside the products with matrices.

        Args:
            seq_len: tokens of a sequence.
        """
        raise NotImplementedError

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Returns the bytes that are kept of a token for the backward pass.

        Args:
            seq_len: tokens of a sequence.
            low: bytes of a number that autocast may lower.
        """
        raise NotImplementedError

    def parameter_roles(self) -> dict[str, str]:
        """Returns the optimizer's role of each parameter, see `hgrn2.nn.parameters.parameter_roles`."""
        return parameter_roles(self)

    @classmethod
    def memory(cls, options: Any) -> Memory:
        """Says what the state holds: a "state" of fixed size, the "tokens" read, or a "window" of them.

        Args:
            options: of the mixer.
        """
        del options
        return "state"

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Makes the state before the first token.

        Args:
            batch_size: number of sequences.
            device: where; None for that of the weights.
            dtype: of the layer's inputs; None for that of the weights. Recurrent states are float32 in any case
                (float64 for float64 inputs).
        """
        weight = next(p for p in self.parameters() if p.is_floating_point())
        device = weight.device if device is None else device
        specs = self.state_spec(weight.dtype if dtype is None else dtype)
        return {name: spec.zeros(batch_size, device) for name, spec in specs.items()}
