"""Causal softmax attention, full or in a sliding window, for hybrid models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        """Attends; arguments as `HGRN2Mixer.forward`, the lower bound is not used."""
        del lower_bound
        batch, length, _ = x.shape
        packing = None if cu_seqlens is None else _Packing.of(cu_seqlens, length)
        if packing is None:
            valid = torch.ones((batch, length), dtype=torch.bool, device=x.device) if mask is None else mask
            position = (valid.long().cumsum(1) - 1).clamp_min(0)
            before = 0 if state is None else state["position"].unsqueeze(1)
        else:
            valid, position = packing.valid, packing.offset
            before = 0 if state is None else state["position"][packing.sequence]
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_size))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        if self.rope_theta is not None:
            q, k = self._rotate(q, position + before), self._rotate(k, position + before)
        count = valid.sum(1)
        if packing is not None and state is None:
            y = self._attend(q, k, v, self._seen_packed(packing.sequence))
            k, v = packing.pad(k), packing.pad(v)
        else:
            if packing is not None:
                q, k, v = packing.pad(q), packing.pad(k), packing.pad(v)
            if state is not None:
                k = torch.cat([state["key"].to(k.dtype), k], 1)
                v = torch.cat([state["value"].to(v.dtype), v], 1)
                valid = torch.cat([state["valid"], valid], 1)
                count = count + state["position"]
            y = self._attend(q, k, v, self._seen(valid, q.shape[1]))
            if packing is not None:
                y = packing.unpad(y)
        if packing is not None or mask is not None:
            k, v, valid = _close_gaps(k, v, valid)
        # what no later query can see is dropped
        first = 0 if self.window_size is None else max(0, k.shape[1] - self.window_size + 1)
        new_state = {"key": k[:, first:], "value": v[:, first:], "valid": valid[:, first:], "position": count}
        return self.o_proj(y), new_state

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        """The state before the first token: an empty cache."""
        shape = (batch_size, 0, self.num_kv_heads, self.head_size)
        return {
            "key": torch.zeros(shape, device=device, dtype=dtype),
            "value": torch.zeros(shape, device=device, dtype=dtype),
            "valid": torch.zeros(shape[:2], device=device, dtype=torch.bool),
            "position": torch.zeros(batch_size, device=device, dtype=torch.long),
        }

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Attention of q [B, T, heads, size] where seen [B, T, keys] allows; returns [B, T, D]."""
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen.unsqueeze(1),
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return y.transpose(1, 2).flatten(2)

    def _seen(self, valid: Tensor, length: int) -> Tensor:
        """Which of the keys, valid [B, keys], the last `length` places see, bool [B, T, keys]."""
        # counted in tokens: padding may lie between the cache and new keys
        key = valid.cumsum(1)
        query = key[:, key.shape[1] - length :]
        seen = valid.unsqueeze(1) & self._reaches(query.unsqueeze(2), key.unsqueeze(1))
        # a padded query sees itself: a row without a key would be NaN
        itself = torch.ones_like(seen[0], dtype=torch.bool).triu(key.shape[1] - length).tril(key.shape[1] - length)
        return seen | itself

    def _seen_packed(self, sequence: Tensor) -> Tensor:
        """Which rows each row of packed sequences sees, bool [1, T, T]."""
        row = torch.arange(sequence.shape[0], device=sequence.device)
        same = sequence.unsqueeze(1) == sequence.unsqueeze(0)
        return (same & self._reaches(row.unsqueeze(1), row.unsqueeze(0))).unsqueeze(0)

    def _reaches(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether places of keys are not after those of queries, and within the window."""
        seen = key <= query
        return seen if self.window_size is None else seen & (key > query - self.window_size)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotates halves of x [B, T, heads, size] by position * theta^(-2 i / size)."""
        assert self.rope_theta is not None
        half = self.head_size // 2
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponent = torch.arange(half, device=x.device, dtype=dtype) / half
        angle = position.unsqueeze(-1).to(dtype) * self.rope_theta**-exponent
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        a, b = x[..., :half].to(dtype), x[..., half:].to(dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclass(frozen=True)
class _Packing:
    """Where the rows of packed sequences lie in a left-padded batch.

    Attributes:
        sequence: [T], the sequence of each row.
        offset: [1, T], each row's place in its sequence.
        column: [T], each row's column in the batch.
        row: [N, longest], the row at each place of the batch; any where there is none.
        valid: [N, longest] bool, whether there is one.
    """

    sequence: Tensor
    offset: Tensor
    column: Tensor
    row: Tensor
    valid: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int) -> _Packing:
        starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        rows = torch.arange(length, device=cu_seqlens.device)
        sequence = torch.searchsorted(stops, rows, right=True)
        longest = length
        # a trace cannot depend on values
        if length and not torch.compiler.is_compiling():
            longest = int((stops - starts).max())
        row = stops.unsqueeze(1) - longest + torch.arange(longest, device=cu_seqlens.device)
        return cls(
            sequence=sequence,
            offset=(rows - starts[sequence]).unsqueeze(0),
            column=longest - stops[sequence] + rows,
            row=row.clamp_min(0),
            valid=row >= starts.unsqueeze(1),
        )

    def pad(self, x: Tensor) -> Tensor:
        """Rows [1, T, ...] as a batch [N, longest, ...]."""
        return x[0][self.row]

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x[self.sequence, self.column].unsqueeze(0)


def _close_gaps(k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves padding before the tokens, and drops columns that hold nothing else."""
    order = valid.long().argsort(dim=1, stable=True)
    if valid.numel() and not torch.compiler.is_compiling():
        order = order[:, order.shape[1] - int(valid.sum(1).max()) :]
    where = order.unsqueeze(-1).unsqueeze(-1)
    return k.take_along_dim(where, 1), v.take_along_dim(where, 1), valid.take_along_dim(order, 1)
