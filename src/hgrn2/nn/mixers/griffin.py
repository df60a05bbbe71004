"""The recurrent token mixer of Griffin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import DirectedMixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.directions import convolve
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import linear_scan
from hgrn2.shapes import BT, BTD

# c of the paper
SHARPNESS = 8.0
# range of the initial decays with an open gate, exp(-8 softplus(decay))
DECAYS = (0.9, 0.999)


@dataclass(frozen=True)
class GriffinOptions(MixerOptions):
    """Options of `Griffin`, documented as its arguments."""

    width: Annotated[int | None, Ge(1)] = None
    num_blocks: Annotated[int, Ge(1)] = 16
    conv_size: Annotated[int, Ge(2)] = 4
    bias: bool = False

    def check_width(self, hidden_size: int) -> None:
        """Refuse blocks that do not divide the channels."""
        if (self.width or hidden_size) % self.num_blocks:
            found = f"num_blocks is {self.num_blocks}, which does not divide {self.width or hidden_size} channels"
            raise UserError(f"{found}; wanted a divisor of width (null: of hidden_size)", "contradiction")


@register_mixer("griffin", GriffinOptions)
class Griffin(DirectedMixer):
    """Recurrent block with the RG-LRU (arXiv 2402.19427, section 2), with W channels.

        y = gelu(x W_y)    u = conv(x W_x) + bias    r, i = sigmoid(u W_r + b_r), sigmoid(u W_i + b_i)
        log a_t = -8 r_t softplus(decay)    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t    out = (h * y) W_out

    W_r and W_i are block-diagonal. The factor of the first token of a sequence is 1 instead of sqrt(1 - a^2).

    Args:
        hidden_size: the width of the model.
        width: W; None means hidden_size. The paper has about 4/3 of it.
        num_blocks: blocks of W_r and W_i; divides W.
        conv_size: taps of the convolution.
        bias: whether W_x, W_y and W_out have biases.
    """

    can_pack = True
    can_pad = True

    def __init__(self, hidden_size: int, width: int | None, num_blocks: int, conv_size: int, bias: bool):
        super().__init__()
        self.width, self.num_blocks, self.conv_size = width or hidden_size, num_blocks, conv_size
        block = self.width // num_blocks
        self.y_proj = nn.Linear(hidden_size, self.width, bias=bias)
        self.x_proj = nn.Linear(hidden_size, self.width, bias=bias)
        self.conv1d = ShortConv(self.width, conv_size)
        self.conv_bias = nn.Parameter(torch.zeros(self.width))
        # recurrence and input gate, [num_blocks, inputs, outputs of both]
        self.gate_weight = nn.Parameter(torch.zeros(num_blocks, block, 2 * block))
        self.gate_bias = nn.Parameter(torch.zeros(num_blocks, 2 * block))
        self.decay = nn.Parameter(torch.zeros(self.width))
        self.o_proj = nn.Linear(self.width, hidden_size, bias=bias)

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute the decays and the gated inputs of the recurrence, and the output gate, each [B, T, W]."""
        y, u = functional.gelu(self.y_proj(x), approximate="tanh"), self.x_proj(x)
        mask, wide = context.mask, wide_dtype(x.dtype)
        u = u if mask is None else u * mask.unsqueeze(-1)
        u, conv = convolve(self.conv1d, u, None if state is None else state["conv"], context)
        u = u + self.conv_bias
        gates = torch.einsum("btgi,gij->btgj", u.unflatten(-1, (self.num_blocks, -1)), self.gate_weight)
        r, i = (gate.flatten(2) for gate in (gates.to(wide) + self.gate_bias).sigmoid().chunk(2, -1))
        log_a = -SHARPNESS * r * functional.softplus(self.decay.to(wide))
        return Projected((log_a, i, u), (y,), {"conv": conv})

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[Tensor, MixerState]:
        """Run the recurrence; arguments and results of `DirectedMixer.mix`."""
        log_a, i, u = inputs
        # the derivative of the root is finite above 0
        factor = (-torch.expm1(2 * log_a)).clamp_min(torch.finfo(log_a.dtype).tiny).sqrt()
        first, started = _first_tokens(u, None if state is None else state["started"], context, reverse)
        factor = factor.masked_fill(first.unsqueeze(-1), 1)
        a, b = log_a.exp(), factor * i * u.to(log_a.dtype)
        if context.mask is not None:
            padding = ~context.mask.unsqueeze(-1)
            a, b = a.masked_fill(padding, 1), b.masked_fill(padding, 0)
        before = None if state is None else state["recurrent"]
        h, after = linear_scan(a, b, initial_state=before, cu_seqlens=context.cu_seqlens, reverse=reverse)
        return h, {"recurrent": after, "started": started}

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> BTD:
        """Gate the recurrence's outputs [B, T, W], and project them to [B, T, D]."""
        (gate,) = others
        return self.o_proj(y.to(gate.dtype) * gate)

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "conv" [taps - 1, W], "recurrent" [W], and whether a token was "started" with."""
        return {
            "conv": StateSpec((self.conv_size - 1, self.width), dtype),
            "recurrent": StateSpec((self.width,), wide_dtype(dtype)),
            "started": StateSpec((), torch.bool),
        }

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections as every mixer does, and gates, decays and convolution as the authors."""
        init.draw(self.y_proj, self.x_proj)
        init.draw_end(self.o_proj)
        nn.init.normal_(self.conv1d.weight, 0, 0.1 * self.conv_size**-0.5, generator=init.generator)
        nn.init.normal_(self.gate_weight, 0, self.gate_weight.shape[1] ** -0.5, generator=init.generator)
        nn.init.zeros_(self.conv_bias)
        nn.init.zeros_(self.gate_bias)
        nn.init.uniform_(self.decay, *DECAYS, generator=init.generator)
        # the inverse of exp(-8 softplus(decay))
        self.decay.copy_(torch.expm1(-self.decay.log() / SHARPNESS).log())

    def flops(self, seq_len: int) -> int:
        """Count the convolution, the block-diagonal products and the recurrence."""
        del seq_len
        return self.width * (2 * self.conv_size + 2 * self.gate_weight.shape[2] + 2)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count both branches, the stages of gates and factors, and what the scan keeps."""
        del seq_len
        copies = low + 4 if low < 4 else 0
        return (5 * low + 11 * 4 + copies) * self.width

    def scan_activation_bytes(self, low: int) -> int:
        """Count the stages of the factor, the decays and what the scan keeps."""
        return (7 * 4 + low) * self.width

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        return f"{self.width} channels, {self.num_blocks} blocks"


def _first_tokens(x: BTD, started: Tensor | None, context: Context, reverse: bool) -> tuple[BT, Tensor]:
    """Return which tokens [B, T] a scan reads first, and which sequences [N] have begun after the call."""
    cu_seqlens, (batch, length) = context.cu_seqlens, x.shape[:2]
    num = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    started = torch.zeros(num, dtype=torch.bool, device=x.device) if started is None else started
    if cu_seqlens is not None:
        begins = (cu_seqlens.diff() > 0) & ~started
        # one more place for the bounds of empty sequences
        count = torch.zeros(length + 1, dtype=torch.long, device=x.device)
        place = cu_seqlens[1:].long() if reverse else cu_seqlens[:-1].long()
        count = count.index_add(0, place, begins.long())
        first = (count[1:] if reverse else count[:length]).unsqueeze(0) > 0
        return first, started | begins
    valid = torch.ones((batch, length), dtype=torch.bool, device=x.device) if context.mask is None else context.mask
    seen = valid.long().cumsum(1)
    first = valid & (seen == (seen[:, -1:] if reverse else 1)) & ~started.unsqueeze(1)
    return first, started | valid.any(1)
