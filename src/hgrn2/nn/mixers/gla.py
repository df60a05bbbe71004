"""Gated linear attention with an untied key: GLA, and HGRN2 without its tied key for ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge, Gt
from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import DirectedMixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.outer_product import (
    bounded_log_sigmoid,
    mix_outer_products,
    outer_product_flops,
    pass_over_padding,
)
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues
from hgrn2.shapes import BTD

# the paper's temperature: log decays are divided by it, so that gates start close to 1
TEMPERATURE = 16


@dataclass(frozen=True)
class GLAOptions(MixerOptions):
    """Options of `GLA`; the defaults are GLA's, and `GLA` says which make it HGRN2 without the tied key.

    Attributes:
        num_heads: H.
        key_ratio: width of queries, keys and gates over D; K = key_ratio D / H.
        gate: "low-rank" (GLA's) or "sigmoid" (HGRN2's).
        gate_rank: width between the two projections of a low-rank gate.
        use_lower_bound: whether a sigmoid gate is at least the lower bound of its layer.
        output_gate: whether SiLU of a projection of x multiplies the normalised output.
        q_activation: activation of the query, "none" or "silu".
        norm_heads: whether the norm runs over each head; otherwise over all of D.
        norm_eps: eps of this norm.
    """

    num_heads: Annotated[int, Ge(1)] = 4
    key_ratio: Annotated[float, Gt(0)] = 0.5
    gate: Literal["low-rank", "sigmoid"] = "low-rank"
    gate_rank: Annotated[int, Ge(1)] = 16
    use_lower_bound: bool = True
    output_gate: bool = True
    q_activation: Literal["none", "silu"] = "none"
    norm_heads: bool = True
    norm_eps: Annotated[float, Ge(0)] = 1e-5

    def check_width(self, hidden_size: int) -> None:
        """Refuse heads of broken width, and a lower bound of another width than the gates."""
        if hidden_size % self.num_heads or self.key_ratio * hidden_size % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}, with hidden_size = {hidden_size} and key_ratio = {self.key_ratio}; "
                "wanted heads of a whole width",
                "contradiction",
            )
        if GLA.is_bounded(self) and self.key_ratio != 1:
            raise UserError(
                f"key_ratio is {self.key_ratio}; wanted 1 beside a lower bound, or use_lower_bound = false",
                "contradiction",
            )


@register_mixer("gla", GLAOptions)
class GLA(DirectedMixer):
    """Gated linear attention (arXiv 2312.06635, section 4).

        q = x W_q    k = x W_k    v = x W_v    log f = logsigmoid(x W_1 W_2 + b) / 16
        S_t = Diag(f_t) S_{t-1} + k_t v_t^T    y_t = K^-0.5 S_t^T q_t
        out = (RMSNorm(y) * SiLU(x W_g)) W_o

    The paper has a LayerNorm in place of the RMSNorm, and a bias beside W_g; its released code has neither.

    For ablations: gate = "sigmoid", key_ratio = 1, output_gate = false, q_activation = "silu", norm_heads = false and
    HGRN2's number of heads give HGRN2 with a free key instead of 1 - f.

    Args:
        hidden_size: D.
        **options: the fields of `GLAOptions`.
    """

    can_pack = can_pad = can_split = folds_columns = True

    def __init__(self, hidden_size: int, **options: float | str):
        super().__init__()
        self.options = own = GLAOptions(**options)  # pyright: ignore[reportArgumentType]
        own.check_width(hidden_size)
        key_width = round(own.key_ratio * hidden_size)
        self.num_heads, self.k_width = own.num_heads, key_width // own.num_heads
        self.v_width = hidden_size // own.num_heads
        self.q_proj, self.k_proj = (nn.Linear(hidden_size, key_width, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        if own.gate == "sigmoid":
            gate = [nn.Linear(hidden_size, key_width, bias=False)]
        else:
            gate = [nn.Linear(hidden_size, own.gate_rank, bias=False), nn.Linear(own.gate_rank, key_width)]
        self.f_proj = nn.Sequential(*gate)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False) if own.output_gate else None
        self.g_norm = Norm("rmsnorm", self.v_width if own.norm_heads else hidden_size, own.norm_eps, True)

    @classmethod
    def is_bounded(cls, options: GLAOptions) -> bool:
        """Return whether gates have the lower bound of their layer."""
        return options.gate == "sigmoid" and options.use_lower_bound

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute q, k, v and the log decays, each [B, T, H, K or V], and the output gate [B, T, D] if there is one."""
        del state
        q, k, v, log_f = self.q_proj(x), self.k_proj(x), self.v_proj(x), self._log_decay(x, context.lower_bound)
        if self.options.q_activation == "silu":
            q = functional.silu(q)
        q, k, v, log_f = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v, log_f))
        k, log_f = pass_over_padding(k, log_f, context.mask)
        gate = () if self.gate_proj is None else (self.gate_proj(x),)
        return Projected((q, k, v, log_f), gate, {})

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[Tensor, MixerState]:
        """Run the recurrence; arguments and results of `DirectedMixer.mix`."""
        q, k, v, log_f = inputs
        before = None if state is None else state["recurrent"]
        y, end = mix_outer_products(
            q, k, v, log_f, before, context, scale=self.k_width**-0.5, reverse=reverse, backend=self.backend
        )
        return y, {"recurrent": end}

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> BTD:
        """Normalise the outputs [B, T, H, V], gate them if there is a gate, and project them to [B, T, D]."""
        y = self.g_norm(y).flatten(2) if self.options.norm_heads else self.g_norm(y.flatten(2))
        for gate in others:
            y = y * functional.silu(gate)
        return self.o_proj(y)

    def _log_decay(self, x: Tensor, bound: Tensor | None) -> Tensor:
        """Return the logarithm of the forget gate [B, T, H K], in float32 or wider."""
        z = self.f_proj(x)
        z = z.to(wide_dtype(z.dtype))
        if bound is not None:
            return bounded_log_sigmoid(z, bound)
        return functional.logsigmoid(z) / (TEMPERATURE if self.options.gate == "low-rank" else 1)

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "recurrent" [H, K, V]."""
        return {"recurrent": StateSpec((self.num_heads, self.k_width, self.v_width), wide_dtype(dtype))}

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections."""
        init.draw(self.q_proj, self.k_proj, self.v_proj, *self.f_proj, self.gate_proj, self.g_norm)
        init.draw_end(self.o_proj)

    def flops(self, seq_len: int) -> int:
        """Count the scan, computed in whole chunks."""
        del seq_len
        return outer_product_flops(self.num_heads, self.k_width, self.v_width)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count q, k and v, the gates with their pre-activations, and what the norm and the output gate save."""
        del seq_len
        own, key_width, width = self.options, self.num_heads * self.k_width, self.num_heads * self.v_width
        kept = low * (2 * key_width + width) + self.g_norm.activation_bytes(low) * (width // self.g_norm.size)
        # in float32 the log decay, the input and a buffer of logsigmoid; with a bound four more, and a condition
        kept += (3 * 4 + (4 * 4 + 1) * self.is_bounded(own)) * key_width + low * own.gate_rank * (len(self.f_proj) - 1)
        return kept + low * (key_width * (own.q_activation == "silu") + 3 * width * own.output_gate)
