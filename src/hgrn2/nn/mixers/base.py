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
    """Inputs of a forward pass besides the hidden states; made once per pass, then adapted to each layer.

    Attributes:
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
        mask: [B, T] bool, False where a token is padding, or None.
        keep_state: whether to return the new state.
        is_step: whether x is a single token after a state, for which a mixer may use a faster form.
        lower_bound: [D] float32 in [0, 1), the bound of this layer's gates; None for 0, and for mixers that do not use
            lower bounds.
        earlier: features returned by earlier layers, the nearest last; at most `Mixer.num_earlier`.
    """

    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    keep_state: bool = True
    is_step: bool = False
    lower_bound: Tensor | None = None
    earlier: tuple[MixerState, ...] = ()

    def for_layer(self, lower_bound: Tensor | None, earlier: tuple[MixerState, ...]) -> Context:
        """Return the context of one layer."""
        if lower_bound is None and not earlier:
            return self
        return Context(self.cu_seqlens, self.mask, self.keep_state, self.is_step, lower_bound, earlier)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Context:
        """Move the tensors to a device; Accelerate calls this on the arguments of a layer."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return Context(
            move(self.cu_seqlens), move(self.mask), self.keep_state, self.is_step, move(self.lower_bound),
            tuple({k: x.to(device, non_blocking=non_blocking) for k, x in some.items()} for some in self.earlier),
        )  # fmt: skip


@dataclass(frozen=True)
class StateSpec:
    """Shape and dtype of one tensor of a mixer's state.

    Zeros (False for bool) mean the start of a sequence; a mixer must encode its state accordingly.

    Attributes:
        shape: shape for one sequence; the tensor has an axis of N sequences before it.
        dtype: dtype of the tensor.
        grows: whether the first axis of `shape` grows with the tokens read; `shape` has its initial length, and new
            places are appended.
        limit: maximum length of an axis that grows; None for no limit.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: bool = False
    limit: int | None = None

    def zeros(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Return the tensor at the start of `batch_size` sequences."""
        return torch.zeros((batch_size, *self.shape), device=device, dtype=self.dtype)

    def matches(self, x: Tensor) -> bool:
        """Return whether a tensor [N, ...] has this shape."""
        shape = x.shape[1:]
        if self.grows and len(shape) == len(self.shape):
            return tuple(shape[1:]) == self.shape[1:]
        return tuple(shape) == self.shape

    @property
    def num_bytes(self) -> int:
        """Bytes per sequence before the first token."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def bytes_per_token(self) -> int:
        """Bytes added per sequence and token, up to the limit; 0 if the limit is 0."""
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel() if self.grows and self.limit != 0 else 0


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of recurrent states for inputs of a dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MixerOptions:
    """Base of the options of a mixer, as written in a configuration: each mixer derives a frozen dataclass from it."""

    def __post_init__(self) -> None:
        check_fields(self, "options")
        self.check()

    def check(self) -> None:
        """Check values against each other, after their types.

        Raises:
            UserError: a value is invalid; the message begins with the option's name.
        """

    def check_width(self, hidden_size: int) -> None:
        """Check the options against the width of a model.

        Raises:
            UserError: they do not fit the width.
        """


class Mixer(nn.Module):
    """Base class of token mixers, which mix the tokens of x [B, T, D] along time and pass a state from call to call.

    A mixer is registered with `hgrn2.nn.mixers.register_mixer`, and constructed from the width of the model and its
    options: `cls(hidden_size, **options)`.

    Attributes:
        uses_lower_bound: whether the mixer uses `Context.lower_bound`.
        can_pack: whether it supports packed sequences (`Context.cu_seqlens`).
        can_pad: whether it supports padding (`Context.mask`).
        num_earlier: number of earlier layers whose features it needs in `Context.earlier`.
        backend: name of the operators' backend, or "auto"; set after construction.
    """

    uses_lower_bound: ClassVar[bool] = False
    can_pack: ClassVar[bool] = False
    can_pad: ClassVar[bool] = False
    num_earlier: int = 0
    backend: str = "auto"

    def forward(self, x: Tensor, state: MixerState | None, context: Context) -> Any:
        """Mix tokens.

        Args:
            x: [B, T, D].
            state: state after the tokens before x, by the names in `state_spec`; None at the start of a sequence.
            context: further inputs of the pass.

        Returns:
            y [B, T, D], the new state ({} unless `context.keep_state`) and, optionally, features for later layers.
        """
        raise NotImplementedError

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Return the shape and dtype of each tensor of the state, by name.

        Args:
            dtype: dtype of the layer's inputs.
        """
        raise NotImplementedError

    def reset_parameters(self, init: InitialValues) -> None:
        """Set every parameter to its initial value.

        Args:
            init: standard deviations, the layer's index and the source of random numbers.
        """
        raise NotImplementedError

    def flops(self, seq_len: int) -> int:
        """Return the multiplications and additions per token, without those of the projections.

        Args:
            seq_len: tokens of a sequence.
        """
        raise NotImplementedError

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Return the bytes per token that are saved for the backward pass.

        Args:
            seq_len: tokens of a sequence.
            low: bytes of a number whose precision autocast may lower.
        """
        raise NotImplementedError

    def parameter_roles(self) -> dict[str, str]:
        """Return the optimizer's role of each parameter, by name; by default from `hgrn2.nn.parameters`."""
        return parameter_roles(self)

    @classmethod
    def is_bounded(cls, options: Any) -> bool:
        """Return whether a mixer with these options uses lower bounds; by default `uses_lower_bound`.

        Args:
            options: options of the mixer.
        """
        del options
        return cls.uses_lower_bound

    @classmethod
    def memory(cls, options: Any) -> Memory:
        """Return what the state holds: a "state" of fixed size, all "tokens" read, or a "window" of them.

        Args:
            options: options of the mixer.
        """
        del options
        return "state"

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Return the state before the first token.

        Args:
            batch_size: number of sequences.
            device: device of the state; None for that of the weights.
            dtype: dtype of the layer's inputs; None for that of the weights. Recurrent states are float32 in any case
                (float64 for float64 inputs).
        """
        weight = next(p for p in self.parameters() if p.is_floating_point())
        device = weight.device if device is None else device
        specs = self.state_spec(weight.dtype if dtype is None else dtype)
        return {name: spec.zeros(batch_size, device) for name, spec in specs.items()}
