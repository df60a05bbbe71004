"""The token mixer of HGRN2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hgrn2.nn.norm import Norm
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import hgrn2_scan, hgrn2_step
from hgrn2.ops.checks import check_fixed_settings
from hgrn2.shapes import require_shape

# a pre-activation that makes the forget gate exactly 1 and the key exactly 0 in every dtype
_KEEP_STATE = 1e4

MixerState = dict[str, Tensor]


class HGRN2Mixer(nn.Module):
    """Gated linear recurrence with an outer-product state (arXiv 2404.07904, section 3).

        q = x W_q    z = x W_f    v = x W_i    y = scan(q, z, v)    out = Norm(y) W_o

    The norm runs over all heads together.

    Args:
        hidden_size: D; heads are D / expand_ratio.
        expand_ratio: K = V, the width of a head's gate and value.
        q_activation: "silu", "sigmoid" or "none".
        v_activation: "none" or "silu".
        scale: factor of the scan's outputs.
        norm: "rmsnorm" or "layernorm".
        norm_eps: its eps.
        norm_affine: whether it has parameters.
        bias: whether the projections have biases.
        conv_size: taps of a short convolution on q, z and v; 0 for none.
        min_log_decay: smallest log decay while training (the key is not changed), or None.
        backend: see `hgrn2.ops.hgrn2_scan`.

    Raises:
        ValueError: sizes and settings that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        expand_ratio: int,
        *,
        q_activation: str = "silu",
        v_activation: str = "none",
        scale: float = 1.0,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        bias: bool = False,
        conv_size: int = 0,
        min_log_decay: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        check_fixed_settings(min_log_decay, q_activation, v_activation)
        if expand_ratio < 1 or hidden_size < 1 or hidden_size % expand_ratio:
            raise ValueError(f"hidden_size is {hidden_size} and expand_ratio {expand_ratio}; wanted a multiple of it")
        if conv_size < 0:
            raise ValueError(f"conv_size is {conv_size}; wanted the taps of a convolution, or 0 for none")
        self.expand_ratio = expand_ratio
        self.num_heads = hidden_size // expand_ratio
        self.q_activation, self.v_activation, self.scale = q_activation, v_activation, scale
        self.min_log_decay, self.backend = min_log_decay, backend
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.f_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        if conv_size:
            self.q_conv1d = ShortConv(hidden_size, conv_size)
            self.f_conv1d = ShortConv(hidden_size, conv_size)
            self.i_conv1d = ShortConv(hidden_size, conv_size)
        self.conv_size = conv_size
        self.g_norm = Norm(norm, hidden_size, norm_eps, norm_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None = None,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, MixerState]:
        """Mixes tokens; one token of a batch takes the step form.

        Args:
            x: [B, T, D].
            lower_bound: [D] or None.
            state: of the tokens before x, or None at a start.
            cu_seqlens: [N + 1] for packed sequences (B = 1), or None.
            mask: [B, T] bool, False where a token is padding and must leave the state alone, or None.
            keep_state: whether the new state is wanted.

        Returns:
            [B, T, D] and the new state, {} if it is not wanted.

        Raises:
            ValueError: a lower bound of another shape; and as `hgrn2.ops.hgrn2_scan`.
        """
        q, z, v, new_state = self.project(x, state, cu_seqlens, mask)
        bound = None
        if lower_bound is not None:
            require_shape("lower_bound", lower_bound, "D", (self.num_heads * self.expand_ratio,))
            bound = lower_bound.unflatten(-1, (self.num_heads, self.expand_ratio))
        recurrent = None if state is None else state["recurrent"]
        min_log_decay = self.min_log_decay if self.training else None
        if recurrent is not None and x.shape[1] == 1 and cu_seqlens is None and min_log_decay is None:
            y, recurrent = hgrn2_step(
                q[:, 0],
                z[:, 0],
                v[:, 0],
                recurrent,
                bound,
                scale=self.scale,
                backend=self.backend,
                q_activation=self.q_activation,
                v_activation=self.v_activation,
            )
            y = y.unsqueeze(1)
        else:
            y, recurrent = hgrn2_scan(
                q, z, v, bound, initial_state=recurrent, cu_seqlens=cu_seqlens, scale=self.scale, backend=self.backend,
                q_activation=self.q_activation, v_activation=self.v_activation, min_log_decay=min_log_decay,
            )  # fmt: skip
        new_state["recurrent"] = recurrent
        return self.o_proj(self.g_norm(y.flatten(2))), new_state if keep_state else {}

    def project(
        self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, MixerState]:
        """Pre-activations of the scan, each [B, T, H, K], and the state of the short convolutions."""
        projected = {"q": self.q_proj(x), "f": self.f_proj(x), "i": self.i_proj(x)}
        new_state: MixerState = {}
        if self.conv_size:
            for name, conv in (("q", self.q_conv1d), ("f", self.f_conv1d), ("i", self.i_conv1d)):
                before = None if state is None else state[f"{name}_conv"]
                inputs = projected[name] if mask is None else projected[name] * mask.unsqueeze(-1)
                projected[name], new_state[f"{name}_conv"] = conv(inputs, before, cu_seqlens, mask)
        if mask is not None:
            projected["f"] = projected["f"].masked_fill(~mask.unsqueeze(-1), _KEEP_STATE)
        q, z, v = (p.unflatten(-1, (self.num_heads, self.expand_ratio)) for p in projected.values())
        return q, z, v, new_state

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first token."""
        head = self.expand_ratio
        state = {"recurrent": torch.zeros((batch_size, self.num_heads, head, head), device=device)}
        if self.conv_size:
            shape = (batch_size, self.conv_size - 1, self.num_heads * head)
            state |= {f"{name}_conv": torch.zeros(shape, device=device, dtype=dtype) for name in "qfi"}
        return state


def forget_gate(z: Tensor, lower_bound: Tensor | None) -> Tensor:
    """Beta + (1 - beta) sigmoid(z), at least float32: what a token keeps of each channel of the state."""
    gate = torch.sigmoid(z.to(torch.promote_types(z.dtype, torch.float32)))
    return gate if lower_bound is None else lower_bound + (1 - lower_bound) * gate
