"""The protocol of token mixers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hgrn2.constraints import check_fields
from hgrn2.errors import UserError
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.directions import NUM_SCANS, check_direction, refuse_state, run_direction
from hgrn2.nn.parameters import InitialValues, parameter_roles

Memory = Literal["state", "window", "tokens"]


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
        can_split: whether it supports sequences split over ranks (`Context.pieces`).
        num_earlier: number of earlier layers whose features it needs in `Context.earlier`.
        backend: name of the operators' backend, or "auto"; set after construction.
        direction: one of `hgrn2.nn.mixers.DIRECTIONS`, set by `set_direction`; "causal" unless it is a
            `DirectedMixer`.
    """

    uses_lower_bound: ClassVar[bool] = False
    can_pack: ClassVar[bool] = False
    can_pad: ClassVar[bool] = False
    can_split: bool = False
    num_earlier: int = 0
    backend: str = "auto"
    direction: str = "causal"

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

    def set_direction(self, direction: str) -> None:
        """Set the direction in which the mixer reads tokens; parameters do not depend on it.

        Args:
            direction: one of `hgrn2.nn.mixers.directions.DIRECTIONS`.

        Raises:
            UserError: the direction does not exist, or the mixer can only be causal.
        """
        check_direction(direction)
        if direction != "causal" and not isinstance(self, DirectedMixer):
            raise UserError(
                f"direction is {direction!r}, and {type(self).__name__} can only be causal; choose another mixer",
                "unsupported",
            )
        self.direction = direction

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

    def flops_in_direction(self, seq_len: int) -> int:
        """Return the multiplications and additions per token beyond one pass of the projections.

        Args:
            seq_len: tokens of a sequence.
        """
        return self.flops(seq_len)

    def activation_bytes_in_direction(self, seq_len: int, low: int) -> int:
        """Return the bytes per token that are saved for the backward pass in the mixer's direction.

        Args:
            seq_len: tokens of a sequence.
            low: bytes of a number whose precision autocast may lower.
        """
        return self.activation_bytes(seq_len, low)

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


class Projected(NamedTuple):
    """Result of `Mixer.project`.

    Attributes:
        inputs: tensors [B, T, ...] that the recurrence reads.
        others: tensors [B, T, ...] that only `Mixer.finish` reads, such as an output gate.
        state: new state of short convolutions, {} without any.
    """

    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    state: MixerState


class DirectedMixer(Mixer):
    """Mixer split into `project`, `mix` and `finish`, from which `forward` is composed in every direction.

    Attributes:
        sees_all: whether the bidirectional form reads all tokens alike, so that a grid makes no difference.
        folds_columns: whether `mix` treats the entries of the inputs' first axis after T independently (heads, or
            channels), so that the columns of a grid can be folded into it; `mix` then may not read `Context.mask`.
    """

    sees_all: ClassVar[bool] = False
    folds_columns: ClassVar[bool] = False

    def forward(self, x: Tensor, state: MixerState | None, context: Context) -> tuple[Tensor, MixerState]:
        """Mix tokens in the mixer's direction; arguments and results of `Mixer.forward`.

        Raises:
            UserError: a state is given to a mixer that is not causal, or the direction's grid is missing or does not
                fit x.
        """
        if self.direction != "causal":
            refuse_state(self.direction, state)
            return run_direction(self, x, context), {}
        inputs, others, new_state = self.project(x, state, context)
        y, mixed = self.mix(inputs, state, context)
        return self.finish(y, others), {**new_state, **mixed} if context.keep_state else {}

    def project(self, x: Tensor, state: MixerState | None, context: Context) -> Projected:
        """Compute the inputs of the recurrence, in which padding writes nothing and keeps the state as it is.

        Args:
            x: [B, T, D].
            state: as in `forward`.
            context: further inputs of the pass; short convolutions follow its `order` and `axis`, see
                `hgrn2.nn.mixers.directions.convolve`.
        """
        raise NotImplementedError

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[Tensor, MixerState]:
        """Run the recurrence, along T.

        Args:
            inputs: tensors [B, T, ...] from `project`; rows or columns of a grid may have become sequences.
            state: as in `forward`.
            context: further inputs of the pass.
            reverse: run from the last token of each sequence to its first.

        Returns:
            y [B, T, ...], and the new state of the recurrence.
        """
        raise NotImplementedError

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Compute the result [B, T, D] from outputs of `mix`, or a sum of them, and `Projected.others`."""
        raise NotImplementedError

    def mix_in_order(self, inputs: tuple[Tensor, ...], context: Context) -> Tensor:
        """Run `mix` in the order of a context; "bidirectional" adds the outputs of both scans.

        Args:
            inputs: as in `mix`.
            context: further inputs of the pass.
        """
        if context.order != "bidirectional":
            return self.mix(inputs, None, context, reverse=context.order == "reverse")[0]
        return self.mix(inputs, None, context)[0] + self.mix(inputs, None, context, reverse=True)[0]

    def scan_activation_bytes(self, low: int) -> int:
        """Return the bytes per token that each scan beyond the first saves, without the states at sequence starts.

        Args:
            low: bytes of a number whose precision autocast may lower.
        """
        del low
        return 0

    def flops_in_direction(self, seq_len: int) -> int:
        """Count every scan, and the projections of the second pass of "2d-series".

        Short convolutions are counted with every scan. Arguments of `Mixer.flops_in_direction`.
        """
        flops = NUM_SCANS[self.direction] * self.flops(seq_len)
        if self.direction == "2d-series":
            flops += sum(2 * part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return flops

    def activation_bytes_in_direction(self, seq_len: int, low: int) -> int:
        """Count what every scan saves; rows and columns of a grid are taken as sqrt(seq_len) tokens long.

        Arguments of `Mixer.activation_bytes_in_direction`.
        """
        direction, num_scans = self.direction, NUM_SCANS[self.direction]
        kept = self.activation_bytes(seq_len, low) + (num_scans - 1) * self.scan_activation_bytes(low)
        width = next(part.in_features for part in self.modules() if isinstance(part, nn.Linear))
        if direction == "2d-series":
            # two passes of two scans, and the input of the second
            kept += self.activation_bytes(seq_len, low) - self.scan_activation_bytes(low) + low * width
        if direction in ("2d", "2d-series"):
            # the first states of short sequences
            states = sum(spec.num_bytes for spec in self.state_spec(torch.float32).values())
            kept += round(num_scans * states / max(math.sqrt(seq_len), 1))
        return kept + (low * width if direction in ("columns", "columns-reverse") else 0)
