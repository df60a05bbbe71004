"""Causal softmax attention, full or in a sliding window, for hybrid models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.errors import UserError

AttentionState = dict[str, Tensor]


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions (arXiv 2104.09864).

    Args:
        hidden_size: D.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        window_size: tokens a query sees, itself included; None for all.
        rope_theta: base of the rotary frequencies; None for no positions.
        qkv_bias: whether the input projections have biases.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, window_size: int | None, rope_theta: float | None,
        qkv_bias: bool,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, hidden_size // num_heads
        self.window_size, self.rope_theta = window_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Attends; arguments as `HGRN2Mixer.forward`, the lower bound is not used.

        Raises:
            UserError: packed sequences that continue from a state.
        """
        del lower_bound
        batch, length, _ = x.shape
        if cu_seqlens is not None and state is not None:
            raise UserError(
                "attention layers cannot carry a state across packed sequences; train hybrids without stream"
            )
        segment = None
        if cu_seqlens is not None:
            rows = torch.arange(length, device=x.device)
            segment = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)
            position = (rows - cu_seqlens.long()[segment]).unsqueeze(0)
            valid = torch.ones((1, length), dtype=torch.bool, device=x.device)
        else:
            valid = torch.ones((batch, length), dtype=torch.bool, device=x.device) if mask is None else mask
            position = (valid.long().cumsum(1) - 1).clamp_min(0)
            if state is not None:
                position = position + state["position"].unsqueeze(1)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_size))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        if self.rope_theta is not None:
            q, k = self._rotate(q, position), self._rotate(k, position)
        past = 0
        if state is not None:
            past = state["key"].shape[1]
            k = torch.cat([state["key"].to(k.dtype), k], 1)
            v = torch.cat([state["value"].to(v.dtype), v], 1)
            valid = torch.cat([state["valid"], valid], 1)
        seen = self._seen(length, past, valid, segment)
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        y = self.o_proj(y.transpose(1, 2).flatten(2))
        if cu_seqlens is not None:
            return y, self.init_state(cu_seqlens.shape[0] - 1, x.device, x.dtype)
        # what no later query can see is dropped
        first = 0 if self.window_size is None else max(0, k.shape[1] - self.window_size + 1)
        count = valid[:, past:].sum(1) + (0 if state is None else state["position"])
        return y, {"key": k[:, first:], "value": v[:, first:], "valid": valid[:, first:], "position": count}

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        """The state before the first token: an empty cache."""
        shape = (batch_size, 0, self.num_kv_heads, self.head_size)
        return {
            "key": torch.zeros(shape, device=device, dtype=dtype),
            "value": torch.zeros(shape, device=device, dtype=dtype),
            "valid": torch.zeros(shape[:2], device=device, dtype=torch.bool),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def _seen(self, length: int, past: int, valid: Tensor, segment: Tensor | None) -> Tensor:
        """Which keys each query sees, bool [B, 1, T, past + T]."""
        query = torch.arange(past, past + length, device=valid.device).unsqueeze(1)
        key = torch.arange(past + length, device=valid.device).unsqueeze(0)
        seen = key <= query
        if self.window_size is not None:
            seen = seen & (key > query - self.window_size)
        if segment is not None:
            seen = seen & (segment.unsqueeze(1) == segment.unsqueeze(0))
        seen = seen & valid.unsqueeze(1)
        # a padded query sees itself: a row without a key would be NaN
        return (seen | (key == query)).unsqueeze(1)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotates halves of x [B, T, heads, size] by position * theta^(-2 i / size)."""
        assert self.rope_theta is not None
        half = self.head_size // 2
        exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = position.unsqueeze(-1).float() * self.rope_theta**-exponent
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        a, b = x[..., :half].float(), x[..., half:].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
