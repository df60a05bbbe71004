"""The token mixer of Mamba."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.nn.mixers.base import DirectedMixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.directions import convolve
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import selective_scan
from hgrn2.ops.selective_scan import tile_length
from hgrn2.shapes import BTD

# range of the initial steps, log-uniform
SMALLEST_STEP, LARGEST_STEP = 1e-3, 1e-1


@dataclass(frozen=True)
class MambaOptions(MixerOptions):
    """Options of `Mamba`, documented as its arguments."""

    state_size: Annotated[int, Ge(1)] = 16
    conv_size: Annotated[int, Ge(2)] = 4
    expand: Annotated[int, Ge(1)] = 2
    dt_rank: Annotated[int | None, Ge(1)] = None
    bias: bool = False


@register_mixer("mamba", MambaOptions)
class Mamba(DirectedMixer):
    """Selective state space (arXiv 2312.00752, section 3), E = expand * D channels with a state of S numbers each.

        u, z = x W_in    u = SiLU(conv(u) + bias)    dt, B, C = u W_x    dt = softplus(dt W_dt + bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t     y_t = h_t C_t + D u_t     out = (y * SiLU(z)) W_out

    A = -exp(A_log) is [E, S], D is [E]; B and C are [S], the same for all channels.

    Args:
        hidden_size: the width of the model.
        state_size: S.
        conv_size: taps of the convolution.
        expand: E / hidden_size.
        dt_rank: rank of the projection to dt; None means ceil(hidden_size / 16).
        bias: whether W_in and W_out have biases.
    """

    can_pack = True
    can_pad = True

    def __init__(self, hidden_size: int, state_size: int, conv_size: int, expand: int, dt_rank: int | None, bias: bool):
        super().__init__()
        width, rank = expand * hidden_size, dt_rank or math.ceil(hidden_size / 16)
        self.width, self.state_size, self.conv_size, self.dt_rank = width, state_size, conv_size, rank
        self.in_proj = nn.Linear(hidden_size, 2 * width, bias=bias)
        self.conv1d = ShortConv(width, conv_size)
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.x_proj = nn.Linear(width, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1).float().log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute u and dt [B, T, E], B and C [B, T, S] of the recurrence, and u and the output gate z [B, T, E]."""
        u, z = self.in_proj(x).chunk(2, -1)
        mask, wide = context.mask, wide_dtype(x.dtype)
        u = u if mask is None else u * mask.unsqueeze(-1)
        u, conv = convolve(self.conv1d, u, None if state is None else state["conv"], context)
        u = functional.silu(u + self.conv_bias)
        dt, b, c = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], -1)
        # the bias decides how small a step is, which low precision would round
        dt = functional.softplus(functional.linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        if mask is not None:
            # without a step the state stays as it is
            dt = dt.masked_fill(~mask.unsqueeze(-1), 0)
        return Projected((u, dt, b, c), (u, z), {"conv": conv})

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[Tensor, MixerState]:
        """Run the recurrence; arguments and results of `DirectedMixer.mix`."""
        u, dt, b, c = inputs
        before = None if state is None else state["ssm"]
        a = -self.A_log.to(dt.dtype).exp()
        y, after = selective_scan(u, dt, a, b, c, initial_state=before, cu_seqlens=context.cu_seqlens, reverse=reverse)
        return y, {"ssm": after}

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> BTD:
        """Add the skip to the recurrence's outputs [B, T, E], gate them and project them to [B, T, D]."""
        u, z = others
        y = y + self.D.to(y.dtype) * u
        return self.out_proj(y.to(z.dtype) * functional.silu(z))

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "conv" [taps - 1, E], the last inputs of the convolution, and "ssm" [E, S]."""
        return {
            "conv": StateSpec((self.conv_size - 1, self.width), dtype),
            "ssm": StateSpec((self.width, self.state_size), wide_dtype(dtype)),
        }

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections as every mixer does, and the rest as the authors: steps, decays and the convolution."""
        init.draw(self.in_proj, self.x_proj)
        init.draw_end(self.out_proj)
        for x, bound in (
            (self.conv1d.weight, self.conv_size**-0.5), (self.conv_bias, self.conv_size**-0.5),
            (self.dt_proj.weight, self.dt_rank**-0.5),
        ):  # fmt: skip
            nn.init.uniform_(x, -bound, bound, generator=init.generator)
        nn.init.uniform_(self.dt_proj.bias, math.log(SMALLEST_STEP), math.log(LARGEST_STEP), generator=init.generator)
        step = self.dt_proj.bias.exp()
        # the inverse of softplus
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log())
        nn.init.ones_(self.D)

    def flops(self, seq_len: int) -> int:
        """Count the convolution, the recurrence and its read-out."""
        del seq_len
        return self.width * (2 * self.conv_size + 4 * self.state_size)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count u and z at every stage, dt, B, C, and a state for every tile of the scan."""
        del seq_len
        narrow = 8 * self.width + self.dt_rank + 2 * self.state_size
        states = self.width * self.state_size // tile_length(self.width, self.state_size, "cpu")
        copies = self.width if low < 4 else 0
        return low * narrow + 4 * (2 * self.width + states + copies)

    def scan_activation_bytes(self, low: int) -> int:
        """Count the flipped u, dt, B and C, and a state for every tile of the scan."""
        states = self.width * self.state_size // tile_length(self.width, self.state_size, "cpu")
        return low * (self.width + 2 * self.state_size) + 4 * (self.width + states)

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        return f"{self.width} channels, state of {self.state_size}, rank {self.dt_rank}"
