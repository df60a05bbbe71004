"""The token mixer of HGRN2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import DirectedMixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.dense_state import DenseState
from hgrn2.nn.mixers.directions import ORDERS, check_direction, convolve
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.mixers.signed_gates import Operands, positive_gate, scan_with_signs, signed_gate
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import check_backend, hgrn2_scan, hgrn2_step
from hgrn2.ops.checks import check_fixed_settings
from hgrn2.ops.gates import activate
from hgrn2.ops.pieces import state_before
from hgrn2.ops.tiles import CHUNK_SIZE
from hgrn2.shapes import BTD, BTHV, describe

# a pre-activation that makes the forget gate exactly 1 and the key exactly 0 in every dtype
_KEEP_STATE = 1e4

# the default width of a head
DEFAULT_EXPAND_RATIO = 128

# ranges of the forget gates
GATE_RANGES = ("positive", "signed")


@dataclass(frozen=True)
class HGRN2Options(MixerOptions):
    """Options of `HGRN2`, documented as its arguments."""

    expand_ratio: int | None = None
    q_activation: str = "silu"
    v_activation: str = "none"
    scale: float | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    bias: bool = False
    conv_size: int = 0
    min_log_decay: float | None = None
    gate_range: str = "positive"
    dense_state: int = 0
    num_earlier: int | None = None


@register_mixer("hgrn2", HGRN2Options)
class HGRN2(DirectedMixer):
    """Gated linear recurrence with an outer-product state (arXiv 2404.07904, section 3).

        q = x W_q    z = x W_f    v = x W_i    y = scan(q, z, v)    out = Norm(y) W_o

    The norm runs over all heads together. `hgrn2.HGRN2Mixer` is the same layer, to be called on its own.

    Args:
        hidden_size: D.
        expand_ratio: K = V, the width of a head's gate and value; the state of a head is expand_ratio x expand_ratio.
            None means D / num_heads, or 128 when num_heads is not given either.
        num_heads: heads, D / expand_ratio. Give one of the two; both must agree.
        q_activation: "silu", "sigmoid" or "none".
        v_activation: "none" or "silu".
        scale: factor of the scan's outputs; None means expand_ratio^-0.5, as in `hgrn2.HGRN2Config`.
        norm: "rmsnorm" or "layernorm".
        norm_eps: eps of this norm.
        norm_affine: whether this norm has parameters.
        bias: whether the projections have biases.
        conv_size: taps of a short convolution on q, z and v; 0 for none.
        min_log_decay: smallest log decay while training (the key is not changed), or None.
        gate_range: "positive" for forget gates in [beta, 1), or "signed" for [2 beta - 1, 1), see
            `hgrn2.nn.mixers.signed_gates`.
        dense_state: earlier layers whose keys and values are added to those of this layer, see
            `hgrn2.nn.mixers.dense_state`; 0 for none.
        num_earlier: number of layers before this one, if fewer than dense_state.
        backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
        direction: "causal", "reverse", "bidirectional", "columns", "columns-reverse", "2d" or "2d-series", see
            `hgrn2.nn.mixers.directions`.

    Raises:
        UserError: sizes or settings are invalid or contradict each other.
    """

    uses_lower_bound = True
    can_pack = True
    can_pad = True
    folds_columns = True

    def __init__(
        self,
        hidden_size: int,
        expand_ratio: int | None = None,
        *,
        num_heads: int | None = None,
        q_activation: str = "silu",
        v_activation: str = "none",
        scale: float | None = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        bias: bool = False,
        conv_size: int = 0,
        min_log_decay: float | None = None,
        gate_range: str = "positive",
        dense_state: int = 0,
        num_earlier: int | None = None,
        backend: str = "auto",
        direction: str = "causal",
    ):
        super().__init__()
        check_fixed_settings(min_log_decay, q_activation, v_activation)
        check_backend(backend)
        check_direction(direction)
        expand_ratio = _head_width(hidden_size, expand_ratio, num_heads)
        _check_whole("conv_size", conv_size, 0, "the taps of a convolution, or 0 for none")
        _check_whole("dense_state", dense_state, 0, "a number of earlier layers, or 0 for none")
        if gate_range not in GATE_RANGES:
            raise UserError(f"gate_range is {gate_range!r}; wanted one of {', '.join(map(repr, GATE_RANGES))}")
        if gate_range == "signed" and min_log_decay is not None:
            raise UserError(
                f"min_log_decay is {min_log_decay}, and gate_range 'signed'; a floor would separate negative from "
                "positive gates; leave one of them out",
                "contradiction",
            )
        # NaN fails the comparison
        if scale is not None and not (isinstance(scale, int | float) and abs(scale) < float("inf")):
            raise UserError(f"scale is {describe(scale)}; wanted a finite number, or None for expand_ratio^-0.5")
        self.expand_ratio = expand_ratio
        self.num_heads = hidden_size // expand_ratio
        self.scale = expand_ratio**-0.5 if scale is None else scale
        self.q_activation, self.v_activation = q_activation, v_activation
        self.min_log_decay, self.backend = min_log_decay, backend
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.f_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        if conv_size:
            order = ORDERS[direction]
            self.q_conv1d = ShortConv(hidden_size, conv_size, order)
            self.f_conv1d = ShortConv(hidden_size, conv_size, order)
            self.i_conv1d = ShortConv(hidden_size, conv_size, order)
        self.conv_size = conv_size
        self.g_norm = Norm(norm, hidden_size, norm_eps, norm_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.gate_range, self.dense_state = gate_range, dense_state
        self.can_split = gate_range == "positive" and not dense_state
        self.set_direction(direction)
        self.num_earlier = dense_state if num_earlier is None else min(dense_state, num_earlier)
        if self.num_earlier:
            self.dense = DenseState(hidden_size, norm_eps)

    @property
    def has_tied_scan(self) -> bool:
        """Whether `hgrn2_scan` and `hgrn2_step` compute the recurrence: positive gates, and no fused keys."""
        return self.gate_range == "positive" and not self.dense_state

    def set_direction(self, direction: str) -> None:
        """Set the direction; features of earlier layers are for the causal one only, see `Mixer.set_direction`."""
        super().set_direction(direction)
        if self.dense_state and direction != "causal":
            raise UserError(
                f"dense_state is {self.dense_state}, and direction {direction!r}; wanted 'causal' beside dense_state",
                "unsupported",
            )

    def forward(self, x: BTD, state: MixerState | None, context: Context) -> Any:
        """Mix tokens with the gated recurrence; arguments and results of `Mixer.forward`."""
        if self.dense_state:
            return self._forward_dense(x, state, context)
        if self.direction != "causal":
            return super().forward(x, state, context)
        # as the base class does, but q goes from this file to the scan
        inputs, others, new_state = self.project(x, state, context)
        y, mixed = self.mix(inputs, state, context)
        return self.finish(y, others), {**new_state, **mixed} if context.keep_state else {}

    def _forward_dense(self, x: BTD, state: MixerState | None, context: Context) -> tuple[BTD, MixerState, MixerState]:
        """Mix tokens with features of earlier layers; return those of this layer, before their fusion, as well."""
        (q, z, v), _, new_state = self.project(x, state, context)
        q, k, v, decays = self._activate(q, z, v, context)
        features = {"k": k.flatten(2), "v": v.flatten(2)}
        if self.num_earlier:
            fused = self.dense(x, features["k"], features["v"], context.earlier)
            k, v = (part.unflatten(-1, (self.num_heads, self.expand_ratio)) for part in fused)
            if context.mask is not None:
                k = k.masked_fill(~context.mask[..., None, None], 0)
        before = None if state is None else state["recurrent"]
        y, new_state["recurrent"] = scan_with_signs(
            Operands(q, k, v, decays), before, context, scale=self.scale, backend=self.backend
        )
        return self.finish(y), new_state if context.keep_state else {}, features

    def _activate(self, q: Tensor, z: Tensor, v: Tensor, context: Context) -> Operands:
        """Return the operands of `scan_with_signs` from pre-activations."""
        bound = context.lower_bound
        gate = signed_gate if self.gate_range == "signed" else positive_gate
        k, decays = gate(z, None if bound is None else bound.reshape(z.shape[2], -1))
        if self.training and self.min_log_decay is not None:
            decays = decays._replace(log_size=decays.log_size.clamp_min(self.min_log_decay))
        q_read, value = activate(q, self.q_activation), activate(v, self.v_activation)
        return Operands(q_read, k.to(q.dtype), value, decays)

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute the scan's pre-activations q, z and v, each [B, T, H, K], and the state of the short convolutions."""
        mask = context.mask
        projected = {"q": self.q_proj(x), "f": self.f_proj(x), "i": self.i_proj(x)}
        new_state: MixerState = {}
        if self.conv_size:
            for name, conv in (("q", self.q_conv1d), ("f", self.f_conv1d), ("i", self.i_conv1d)):
                before = None if state is None else state[f"{name}_conv"]
                inputs = projected[name] if mask is None else projected[name] * mask.unsqueeze(-1)
                projected[name], new_state[f"{name}_conv"] = convolve(conv, inputs, before, context)
        if mask is not None:
            projected["f"] = projected["f"].masked_fill(~mask.unsqueeze(-1), _KEEP_STATE)
        q, z, v = (p.unflatten(-1, (self.num_heads, self.expand_ratio)) for p in projected.values())
        return Projected((q, z, v), (), new_state)

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[BTHV, MixerState]:
        """Run the recurrence on q, z and v; arguments and results of `DirectedMixer.mix`."""
        q, z, v = inputs
        before = None if state is None else state["recurrent"]
        if self.gate_range == "signed":
            y, after = scan_with_signs(
                self._activate(q, z, v, context), before, context, scale=self.scale, backend=self.backend,
                reverse=reverse,
            )  # fmt: skip
            return y, {"recurrent": after}
        if context.pieces is not None:
            _, k, values, decays = self._activate(q, z, v, context)
            before = state_before(k, values, decays.log_size, context.cu_seqlens, context.pieces)
        bound = context.lower_bound
        if bound is not None:
            bound = bound.reshape(q.shape[2], self.expand_ratio)
        min_log_decay = self.min_log_decay if self.training else None
        if context.is_step and before is not None and min_log_decay is None:
            y, after = hgrn2_step(
                q[:, 0],
                z[:, 0],
                v[:, 0],
                before,
                bound,
                scale=self.scale,
                backend=self.backend,
                q_activation=self.q_activation,
                v_activation=self.v_activation,
            )
            return y.unsqueeze(1), {"recurrent": after}
        y, after = hgrn2_scan(
            q, z, v, bound, initial_state=before, cu_seqlens=context.cu_seqlens, reverse=reverse, scale=self.scale,
            q_activation=self.q_activation, v_activation=self.v_activation, min_log_decay=min_log_decay,
            backend=self.backend,
        )  # fmt: skip
        return y, {"recurrent": after}

    def finish(self, y: BTHV, others: tuple[Tensor, ...] = ()) -> BTD:
        """Normalise the scan's outputs [B, T, H, V] over all heads, and project them to [B, T, D]."""
        del others
        return self.o_proj(self.g_norm(y.flatten(2)))

    def forget_gate(self, x: BTD, state: MixerState | None, context: Context) -> BTD:
        """Compute the sizes of the forget gates, [B, T, D] in float32 or wider: how much of the state a token keeps.

        Short convolutions follow the order of the context, not the mixer's direction.
        """
        z = self.project(x, state, context).inputs[1]
        gate = forget_gate(z.flatten(2), context.lower_bound)
        return gate if self.gate_range == "positive" else (2 * gate - 1).abs()

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "recurrent" [H, K, V], and the last inputs of the convolutions, [taps - 1, D]."""
        head = self.expand_ratio
        specs = {"recurrent": StateSpec((self.num_heads, head, head), wide_dtype(dtype))}
        if self.conv_size:
            before = StateSpec((self.conv_size - 1, self.num_heads * head), dtype)
            specs |= {f"{name}_conv": before for name in "qfi"}
        return specs

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections and convolutions."""
        init.draw(self.q_proj, self.f_proj, self.i_proj)
        if self.conv_size:
            init.draw(self.q_conv1d, self.f_conv1d, self.i_conv1d)
        if self.num_earlier:
            self.dense.reset_parameters(init)
        init.draw(self.g_norm)
        init.draw_end(self.o_proj)

    def flops(self, seq_len: int) -> int:
        """Count the scan, computed in whole chunks: scores, values, reads and updates of the state."""
        del seq_len
        width, chunk = self.expand_ratio, CHUNK_SIZE
        per_head = (chunk + 1) * width + 2 * chunk * width + 4 * width * width
        # at each join of two blocks, a query or key row and a decay are multiplied by a decay
        per_head += round(width * math.log2(chunk))
        return self.num_heads * per_head + 6 * self.conv_size * self.num_heads * width

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count q, z, v, what the norm saves, inputs of convolutions, and the operands of an untied or signed scan."""
        del seq_len
        width = self.num_heads * self.expand_ratio
        kept = low * 3 * width
        if self.gate_range == "signed":
            # in float32 the gate, its logarithm and the values between, and three conditions
            kept = (5 * low + 29) * width
        elif self.dense_state:
            kept = (4 * low + 31) * width
        if self.dense_state and self.min_log_decay is not None:
            kept += 5 * width
        if self.num_earlier:
            kept += self.dense.activation_bytes(low) + (2 * low * width if self.num_earlier > 1 else 0)
        kept += self.g_norm.activation_bytes(low)
        return kept + (low * 3 * width if self.conv_size else 0)

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        shown = f"{self.num_heads} heads of {self.expand_ratio} x {self.expand_ratio}"
        shown += ", signed gates" if self.gate_range == "signed" else ""
        return shown + (f", features of {self.num_earlier} earlier layers" if self.dense_state else "")


def _check_whole(name: str, value: int, least: int, wanted: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} is {describe(value)}; wanted {wanted}")


def _head_width(hidden_size: int, expand_ratio: int | None, num_heads: int | None) -> int:
    """Return the width of a head from expand_ratio or num_heads."""
    _check_whole("hidden_size", hidden_size, 1, "a whole number of at least 1")
    if num_heads is not None:
        _check_whole("num_heads", num_heads, 1, "a whole number of at least 1")
        if hidden_size % num_heads:
            raise UserError(
                f"hidden_size is {hidden_size}; wanted a multiple of num_heads = {num_heads}", "contradiction"
            )
        if expand_ratio is None:
            return hidden_size // num_heads
    if expand_ratio is None:
        if hidden_size % DEFAULT_EXPAND_RATIO:
            raise UserError(
                f"hidden_size is {hidden_size}; wanted a multiple of {DEFAULT_EXPAND_RATIO}, or expand_ratio or "
                "num_heads beside it",
                "contradiction",
            )
        return DEFAULT_EXPAND_RATIO
    _check_whole("expand_ratio", expand_ratio, 1, "a whole number of at least 1")
    if hidden_size % expand_ratio:
        raise UserError(
            f"hidden_size is {hidden_size}; wanted a multiple of expand_ratio = {expand_ratio}", "contradiction"
        )
    if num_heads not in (None, hidden_size // expand_ratio):
        raise UserError(
            f"num_heads is {num_heads}, and hidden_size / expand_ratio is {hidden_size // expand_ratio}; give one of "
            "the two",
            "contradiction",
        )
    return expand_ratio


def forget_gate(z: Tensor, lower_bound: Tensor | None) -> Tensor:
    """Compute the forget gate beta + (1 - beta) sigmoid(z) in float32 or wider."""
    gate = torch.sigmoid(z.to(torch.promote_types(z.dtype, torch.float32)))
    return gate if lower_bound is None else lower_bound + (1 - lower_bound) * gate
