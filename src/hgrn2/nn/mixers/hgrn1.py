"""The token mixer of HGRN1, with a complex or a real state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.errors import UserError
from hgrn2.nn.expansion import Expansion, ExpansionKind
from hgrn2.nn.mixers.base import DirectedMixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues
from hgrn2.ops import linear_scan
from hgrn2.shapes import BTD


@dataclass(frozen=True)
class HGRN1Options(MixerOptions):
    """Options of `HGRN1`.

    Attributes:
        form: "complex", as in the paper, or "real", as fla ships it.
        norm_before_gate: whether the norm comes before the output gate; None means as the paper for "complex" (after),
            and as fla for "real" (before). The authors' code has a complex state and the norm before the gate.
        norm: "rmsnorm" or "layernorm" (the paper's).
        norm_eps: eps of this norm.
        norm_affine: whether this norm has parameters.
        bias: whether the projections have biases (the paper's do).
        expand_ratio: n, by how much the state of the real form is larger than D.
        expansion: structure of the projections to n D channels, see `hgrn2.nn.expansion.Expansion`.
    """

    form: Literal["complex", "real"] = "complex"
    norm_before_gate: bool | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Annotated[float, Ge(0)] = 1e-5
    norm_affine: bool = True
    bias: bool = False
    expand_ratio: Annotated[int, Ge(1)] = 1
    expansion: ExpansionKind = "dense"

    def check(self) -> None:
        """Refuse an expanded state with complex numbers or with a norm before its gate."""
        if self.expand_ratio > 1 and self.form != "real":
            raise UserError(
                f"expand_ratio is {self.expand_ratio}, and form {self.form!r}; wanted form 'real' beside an expansion",
                "contradiction",
            )
        if self.expand_ratio > 1 and self.norm_before_gate:
            raise UserError(
                f"norm_before_gate is true, and expand_ratio {self.expand_ratio}; the gate of an expanded state comes "
                "first, leave norm_before_gate out",
                "contradiction",
            )

    def check_width(self, hidden_size: int) -> None:
        """Refuse groups of different sizes."""
        if self.expand_ratio > 1 and self.expansion.startswith("group-linear") and hidden_size % self.expand_ratio:
            raise UserError(
                f"expand_ratio is {self.expand_ratio}, and expansion {self.expansion!r}; wanted a number that divides "
                f"hidden_size = {hidden_size}",
                "contradiction",
            )


@register_mixer("hgrn1", HGRN1Options)
class HGRN1(DirectedMixer):
    """Element-wise gated recurrence with lower bounds beta (arXiv 2311.04823, section 3).

        f = beta + (1 - beta) sigmoid(x W_f)    c = SiLU(x W_i)    g = SiLU(x W_g)
        complex: h_t = f_t e^(i theta) h_{t-1} + (1 - f_t) c_t     out = Norm(g * [Re h, Im h]) W_o
        real:    h_t = f_t h_{t-1} + (1 - f_t) c_t                 out = (Norm(h) * g) W_o

    A complex c has its real and imaginary parts side by side in the columns of W_i; theta [D] is learned, and does not
    depend on x. The state is E = 2 D numbers for "complex", E = D for "real".

    With expand_ratio n > 1, the real form has n rows of D channels, each with separate gates, inputs and output gates.
    The output gates read the rows as the query of HGRN2 reads its state:

        h_t = f_t h_{t-1} + (1 - f_t) c_t  [n, D]           out = Norm(sum_i g_i * h_i) W_o

    W_f, W_i and W_g are then `hgrn2.nn.expansion.Expansion`s: the state expansions that arXiv 2404.07904, section 3,
    compares with the outer product. A row has the lower bound of its channel.

    Args:
        hidden_size: D.
        form: "complex" or "real".
        norm_before_gate: whether the norm comes before the output gate; None for the form's own order.
        norm: "rmsnorm" or "layernorm".
        norm_eps: eps of this norm.
        norm_affine: whether this norm has parameters.
        bias: whether the projections have biases.
        expand_ratio: n; for the real form only.
        expansion: structure of the projections to n D channels.
    """

    uses_lower_bound = True
    can_pack = True
    can_pad = True
    folds_columns = True

    def __init__(
        self, hidden_size: int, form: str, norm_before_gate: bool | None, norm: str, norm_eps: float, norm_affine: bool,
        bias: bool, expand_ratio: int = 1, expansion: str = "dense",
    ):  # fmt: skip
        super().__init__()
        self.is_complex = form == "complex"
        self.expand_ratio, self.expansion = expand_ratio, expansion
        norm_first = not self.is_complex and expand_ratio == 1
        self.norm_before_gate = norm_first if norm_before_gate is None else norm_before_gate
        self.hidden_size, self.state_size = hidden_size, hidden_size * (2 if self.is_complex else expand_ratio)
        read_size = 2 * hidden_size if self.is_complex else hidden_size
        sizes = (self.state_size, hidden_size, self.state_size)
        if expand_ratio > 1:
            projections = [Expansion(expansion, hidden_size, expand_ratio, bias) for _ in sizes]
        else:
            projections = [nn.Linear(hidden_size, size, bias=bias) for size in sizes]
        self.i_proj, self.f_proj, self.g_proj = projections
        self.theta = nn.Parameter(_angles(hidden_size)) if self.is_complex else None
        self.g_norm = Norm(norm, read_size, norm_eps, norm_affine)
        self.o_proj = nn.Linear(read_size, hidden_size, bias=bias)

    @property
    def _expansions(self) -> list[Expansion]:
        return [part for part in (self.i_proj, self.f_proj, self.g_proj) if isinstance(part, Expansion)]

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute decays and writes of the recurrence, [B, T, D], and the output gate [B, T, E].

        The writes of a complex state are complex. Its decays are complex only with a mask, since padding has a decay of
        1 without rotation; otherwise they are real, and `mix` rotates them.
        """
        del state
        wide = wide_dtype(x.dtype)
        z, c = self.f_proj(x).to(wide), functional.silu(self.i_proj(x)).to(wide)
        bound = 0 if context.lower_bound is None else context.lower_bound
        keep, write = bound + (1 - bound) * z.sigmoid(), (1 - bound) * (-z).sigmoid()
        if self.theta is not None:
            if context.mask is not None:
                keep = keep * self._rotation(wide)
            # a product of real numbers, whose gradients are real and not twice as wide
            write = torch.view_as_complex(write.unsqueeze(-1) * c.unflatten(-1, (-1, 2)))
        else:
            write = write * c
        # rows of an expansion become channels
        keep, write = keep.flatten(2), write.flatten(2)
        if context.mask is not None:
            padding = ~context.mask.unsqueeze(-1)
            keep, write = keep.masked_fill(padding, 1), write.masked_fill(padding, 0)
        return Projected((keep, write), (self.g_proj(x),), {})

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[Tensor, MixerState]:
        """Run the recurrence; arguments and results of `DirectedMixer.mix`."""
        keep, write = inputs
        before = None if state is None else state["recurrent"]
        if self.theta is not None and before is not None:
            before = torch.view_as_complex(before.contiguous())
        rotation = None
        if self.theta is not None and not keep.is_complex():
            # columns of a grid are folded into channels: repeat the rotation for each column
            rotation = self._rotation(keep.dtype).repeat(keep.shape[-1] // self.hidden_size)
        h, after = linear_scan(
            keep, write, rotation=rotation, initial_state=before, cu_seqlens=context.cu_seqlens, reverse=reverse
        )
        return h, {"recurrent": after if self.theta is None else torch.view_as_real(after)}

    def _rotation(self, dtype: torch.dtype) -> Tensor:
        """Return e^(i theta) [D]."""
        assert self.theta is not None
        theta = self.theta.to(dtype)
        return torch.polar(torch.ones_like(theta), theta)

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> BTD:
        """Gate and normalise the recurrence's outputs [B, T, D], and project them to [B, T, D]."""
        (gate,) = others
        if self.theta is not None:
            y = torch.view_as_real(y).transpose(-1, -2).flatten(-2)
        h, gate = y.to(gate.dtype), functional.silu(gate)
        if self.expand_ratio > 1:
            return self.o_proj(self.g_norm((h.unflatten(2, gate.shape[2:]) * gate).sum(2)))
        return self.o_proj(self.g_norm(h) * gate if self.norm_before_gate else self.g_norm(h * gate))

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "recurrent" [E], or [D, 2] with real and imaginary parts."""
        shape = (self.hidden_size, 2) if self.is_complex else (self.state_size,)
        return {"recurrent": StateSpec(shape, wide_dtype(dtype))}

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections, and set theta_j to 10000^(-2 j / D) as the authors do."""
        for expansion in self._expansions:
            expansion.reset_parameters(init)
        if self.expand_ratio == 1:
            init.draw(self.i_proj, self.f_proj, self.g_proj)
        init.draw(self.g_norm)
        init.draw_end(self.o_proj)
        if self.theta is not None:
            with torch.no_grad():
                self.theta.copy_(_angles(self.hidden_size))

    def flops(self, seq_len: int) -> int:
        """Count the recurrence: a product and a sum, 8 operations of real numbers if they are complex.

        With an expansion, also count its operations beyond one product per weight, and the reading of the rows.
        """
        del seq_len
        if self.expand_ratio == 1:
            return (8 if self.is_complex else 2) * self.hidden_size
        return 4 * self.state_size + sum(part.flops() for part in self._expansions)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count c, g and the gated values in both precisions, the gates, and what the scan and the norm keep."""
        del seq_len
        if self.expand_ratio > 1:
            # for every row: the gates, reads and writes, and the products with the output gates
            kept = sum(part.activation_bytes(low) for part in self._expansions)
            return kept + (28 + 2 * low) * self.state_size + self.g_norm.activation_bytes(low)
        # two sigmoids, 1 - f, and f, which a complex a replaces in the scan
        gates = 4 if self.is_complex else 3
        wide = 4 * (gates * self.hidden_size + 3 * self.state_size)
        return wide + 4 * low * self.state_size + self.g_norm.activation_bytes(low)

    def scan_activation_bytes(self, low: int) -> int:
        """Count the outputs of a scan and, in plain torch, its rotated decays."""
        del low
        return (8 if self.is_complex else 4) * self.state_size

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        expanded = f", {self.expand_ratio} rows by {self.expansion} projections" if self.expand_ratio > 1 else ""
        order = "before" if self.norm_before_gate else "after"
        return f"{'complex' if self.is_complex else 'real'}, norm {order} gate{expanded}"


def _angles(hidden_size: int) -> Tensor:
    return 10000 ** (-2 * torch.arange(hidden_size) / hidden_size)
