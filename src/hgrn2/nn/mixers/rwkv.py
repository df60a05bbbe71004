"""The parts that RWKV-5 and RWKV-6 share: token shift, a bonus for the current token, norm and gate over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import Context, Mixer, MixerOptions, MixerState, StateSpec, wide_dtype
from hgrn2.nn.mixers.outer_product import outer_product_flops, read_before_writing
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.token_shift import token_shift
from hgrn2.shapes import BTD

# the authors divide by 8 before a norm of eps 1e-5
NORM_EPS = 64e-5


@dataclass(frozen=True)
class RWKVOptions(MixerOptions):
    """Options of `RWKV5`.

    Attributes:
        head_size: K = V, the width of a head.
    """

    head_size: Annotated[int, Ge(1)] = 64

    def check_width(self, hidden_size: int) -> None:
        """Refuse a width that is not a multiple of the heads'."""
        if hidden_size % self.head_size:
            raise UserError(
                f"head_size is {self.head_size}, with hidden_size = {hidden_size}; wanted a divisor of it",
                "contradiction",
            )


class RWKV(Mixer):
    """Time mixing of RWKV-5 and RWKV-6 (arXiv 2404.05892, section 4), from inputs that a derived class mixes.

        r, k, v, g = x_r W_r, x_k W_k, x_v W_v, x_g W_g
        y_t = r_t (diag(u) k_t^T v_t + S_{t-1})    S_t = diag(w_t) S_{t-1} + k_t^T v_t
        out = (GroupNorm_heads(y) * SiLU(g)) W_o

    The authors' channel mixing with its token shift is left out: all mixers have the same channel mixer.

    Args:
        hidden_size: D.
        head_size: K = V.
    """

    can_pack = can_pad = True

    def __init__(self, hidden_size: int, head_size: int):
        super().__init__()
        self.num_heads, self.head_size = hidden_size // head_size, head_size
        self.r_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(5)
        )
        self.decay, self.bonus = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))

    def mix_inputs(self, x: BTD, change: BTD) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the inputs of the projections r, k, v and g, and the log decay [B, T, D] in float32 or wider.

        Args:
            x: [B, T, D].
            change: the token before, less x.
        """
        raise NotImplementedError

    def forward(self, x: BTD, state: MixerState | None, context: Context) -> tuple[BTD, MixerState]:
        """Mix tokens; arguments and results of `Mixer.forward`."""
        before = None if state is None else state["shift"]
        previous, last = token_shift(x, before, context.cu_seqlens, context.mask)
        inputs, log_w = self.mix_inputs(x, previous - x)
        projections = (self.r_proj, self.k_proj, self.v_proj, self.g_proj)
        r, k, v, g = (project(part) for project, part in zip(projections, inputs, strict=True))
        r, k, v, log_w = (part.unflatten(-1, (self.num_heads, self.head_size)) for part in (r, k, v, log_w))
        before = None if state is None else state["recurrent"]
        y, end = read_before_writing(r, k, v, log_w, before, context, self.backend)
        bonus = self.bonus.unflatten(0, (self.num_heads, self.head_size))
        y = y + (r * bonus * k).sum(-1, keepdim=True) * v
        y = functional.layer_norm(y, (self.head_size,), eps=NORM_EPS).flatten(2)
        y = torch.addcmul(self.norm_bias, y, self.norm_weight).to(g.dtype) * functional.silu(g)
        return self.o_proj(y), {"shift": last, "recurrent": end} if context.keep_state else {}

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "shift" [D], the last token, and "recurrent" [H, K, V]."""
        head = self.head_size
        return {
            "shift": StateSpec((self.num_heads * head,), dtype),
            "recurrent": StateSpec((self.num_heads, head, head), wide_dtype(dtype)),
        }

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Set the initial values of the authors' code, which ignore the model's `initializer_range`."""
        width, deep = len(self.decay), init.layer / max(init.num_layers - 1, 1)
        for module, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1)):
            drawn = torch.empty_like(module.weight, dtype=torch.float32)
            module.weight.copy_(nn.init.orthogonal_(drawn, gain, generator=init.generator))
        nn.init.zeros_(self.o_proj.weight)
        n = torch.arange(width, device=self.decay.device)
        place = n / max(width - 1, 1)
        self.decay.copy_(5 * place ** (0.7 + 1.3 * deep) - 6)
        self.bonus.copy_(deep * (1 - place) + 0.1 * ((n + 1) % 3 - 1))
        self.norm_weight.fill_(((init.layer + 1) / init.num_layers) ** 0.7)
        self.norm_bias.zero_()

    def flops(self, seq_len: int) -> int:
        """Count the scan, computed in whole chunks."""
        del seq_len
        return outer_product_flops(self.num_heads, self.head_size, self.head_size)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count the change, the inputs and outputs of the projections, and what bonus, norm and gate save."""
        del seq_len
        # three float32 numbers per channel, and per head; the rest are products' inputs and outputs
        return (13 * low + 3 * 4) * len(self.decay) + 3 * 4 * self.num_heads


def initial_mixes(names: str, width: int, init: InitialValues) -> Tensor:
    """Return the authors' initial shares of the token before, [len(names), D].

    Args:
        names: letters of the inputs; r and g, and v, differ from the others.
        width: D.
        init: the layer.
    """
    place, shallow = torch.arange(width) / width, 1 - init.layer / init.num_layers
    deep = init.layer / max(init.num_layers - 1, 1)
    return torch.stack(
        [1 - place ** (shallow * (0.5 if name in "rg" else 1)) - 0.3 * deep * (name == "v") for name in names]
    )
