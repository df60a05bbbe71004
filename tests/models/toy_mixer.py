"""A mixer in one file: a decaying average whose rate depends on the token, with a parameter that is not drawn."""

from dataclasses import dataclass

import torch
from torch import nn

from hgrn2.nn.mixers import Mixer, MixerOptions, StateSpec, register_mixer, wide_dtype


@dataclass(frozen=True)
class AverageOptions(MixerOptions):
    slowest: float = 0.1


@register_mixer("average", AverageOptions)
class Average(Mixer):
    """h_t = a_t h_{t-1} + (1 - a_t) W_v x_t with a_t = exp(-exp(A_log) sigmoid(W_a x_t)); y = W_o h."""

    can_pack = can_pad = True

    def __init__(self, hidden_size, slowest):
        super().__init__()
        self.slowest = slowest
        self.a_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.A_log = nn.Parameter(torch.empty(hidden_size, 1))

    def forward(self, x, state, context):
        wide = wide_dtype(x.dtype)
        a = (-self.A_log[:, 0].to(wide).exp() * self.a_proj(x).to(wide).sigmoid()).exp()
        if context.mask is not None:
            a = a.masked_fill(~context.mask.unsqueeze(-1), 1)
        v = self.v_proj(x).to(wide)
        bounds = torch.tensor([0, a.shape[1]]) if context.cu_seqlens is None else context.cu_seqlens
        shape = (max(len(x), len(bounds) - 1), x.shape[-1])
        h = x.new_zeros(shape, dtype=wide) if state is None else state["h"]
        lengths = bounds.diff().tolist()
        rows = zip(a.split(lengths, 1), v.split(lengths, 1), h.split(len(h) // len(lengths)), strict=True)
        found = [self._average(*row) for row in rows]
        y, h = torch.cat([y for y, _ in found], 1), torch.cat([h for _, h in found])
        return self.o_proj(y.to(x.dtype)), {"h": h} if context.keep_state else {}

    def _average(self, a, v, h):
        outputs = [h := a[:, t] * h + (1 - a[:, t]) * v[:, t] for t in range(a.shape[1])]
        return torch.stack(outputs, 1) if outputs else v, h

    def state_spec(self, dtype):
        return {"h": StateSpec((len(self.A_log),), wide_dtype(dtype))}

    def reset_parameters(self, init):
        init.draw(self.a_proj, self.v_proj)
        init.draw_end(self.o_proj)
        self.A_log.data.copy_(torch.linspace(self.slowest, 1, len(self.A_log)).log().unsqueeze(1))

    def flops(self, seq_len):
        return 0

    def activation_bytes(self, seq_len, low):
        return (2 * low + 4 * 4) * len(self.A_log)
