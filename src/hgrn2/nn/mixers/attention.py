"""Softmax attention, full or in a sliding window, for hybrid models."""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.nn.mixers.attention_cache import close_gaps, stack_caches, token_positions
from hgrn2.nn.mixers.base import DirectedMixer, Memory, MixerOptions, Projected, StateSpec
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.rotary import rotate_halves
from hgrn2.ops.export import is_exporting
from hgrn2.ops.pieces import to_heads, to_tokens
from hgrn2.ops.tracing import constant_in_traces
from hgrn2.ops.transforms import is_batched
from hgrn2.shapes import BTD

# E: width of a head; S: keys; G: heads of keys, H or fewer
Queries = Annotated[Tensor, "B T H E"]
Keys = Annotated[Tensor, "B S G E"]

# least number of queries per block of windowed attention; a block has at least one window
WINDOW_BLOCK = 256


# torch's kernel for packed sequences; None before `load_compiled_parts`, and if this version lacks it or its windows
_flash_ragged: Any = None


@functools.cache
def load_compiled_parts() -> None:
    """Import the parts of torch that only attention needs; they import the compiler, which takes seconds."""
    global _flash_ragged
    # a trace cannot loop over the values of bounds: break the graph here
    Attention._attend_packed = torch.compiler.disable(Attention._attend_packed)  # pyright: ignore
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    if "window_size" in inspect.signature(varlen_attn).parameters:
        _flash_ragged = varlen_attn


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """Options of `Attention`.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; None means num_heads.
        window_size: tokens a query sees, itself included; None means all.
        rope_theta: base of the rotary positions; None means no positions.
        qkv_bias: biases in the q, k and v projections.
    """

    num_heads: int
    num_kv_heads: int | None = None
    window_size: int | None = None
    rope_theta: float | None = 10000.0
    qkv_bias: bool = False

    def check(self) -> None:
        """Check the values against each other, and set num_kv_heads if it is None."""
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_heads < 1:
            raise UserError(f"num_heads is {self.num_heads}; wanted at least 1")
        kv = self.num_kv_heads or 0
        if kv < 1 or self.num_heads % kv:
            raise UserError(
                f"num_kv_heads is {kv}, which does not divide num_heads = {self.num_heads}", "contradiction"
            )
        if self.window_size is not None and self.window_size < 1:
            raise UserError(f"window_size is {self.window_size}; wanted at least 1, or null for no window")
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise UserError(f"rope_theta is {self.rope_theta}; wanted above 0, or null for no positions")

    def check_width(self, hidden_size: int) -> None:
        """Refuse heads of odd width, which cannot be rotated."""
        if hidden_size % (2 * self.num_heads):
            raise UserError(
                f"num_heads is {self.num_heads}; wanted heads of even width, with hidden_size = {hidden_size}",
                "contradiction",
            )


@register_mixer("attention", AttentionOptions)
class Attention(DirectedMixer):
    """Multi-head or grouped-query attention with rotary positions (arXiv 2104.09864).

    Args:
        hidden_size: D.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        window_size: tokens a query sees, itself included; None for all.
        rope_theta: base of the rotary frequencies; None for no positions.
        qkv_bias: whether the input projections have biases.
    """

    can_pack = can_pad = can_split = sees_all = True

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, window_size: int | None, rope_theta: float | None,
        qkv_bias: bool,
    ):  # fmt: skip
        super().__init__()
        load_compiled_parts()
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, hidden_size // num_heads
        self.window_size, self.rope_theta = window_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def project(self, x: BTD, state: MixerState | None, context: Context) -> Projected:
        """Compute q [B, T, heads, size], and k and v [B, T, key heads, size], with their positions applied."""
        cu_seqlens = context.cu_seqlens
        if cu_seqlens is not None and (is_batched(cu_seqlens) or (state is not None and is_batched(state["valid"]))):
            raise UserError(
                "attention to packed sequences reads the values of cu_seqlens and of its state, which vmap maps over; "
                "use a loop",
                "unsupported",
            )
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_size))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_size))
        if context.pieces is not None:
            # all tokens of some heads
            q, k, v = (to_heads(part, context.pieces.ranks) for part in (q, k, v))
            x, cu_seqlens = q, context.pieces.cu_seqlens
        if self.rope_theta is not None:
            position = token_positions(x, state, cu_seqlens, context.mask)
            if context.order == "reverse":
                # rotary angles have a sign: the mirror image of causal attention
                position = -position
            q, k = rotate_halves(q, position, self.rope_theta), rotate_halves(k, position, self.rope_theta)
        return Projected((q, k, v), (), {})

    def mix(
        self, inputs: tuple[Tensor, ...], state: MixerState | None, context: Context, *, reverse: bool = False
    ) -> tuple[BTD, MixerState]:
        """Attend causally, or from the last token to the first; arguments and results of `DirectedMixer.mix`."""
        if context.pieces is not None:
            y, _ = self.mix(inputs, None, Context(context.pieces.cu_seqlens, None, False))
            return to_tokens(y.unflatten(-1, (-1, self.head_size)), context.pieces.ranks).flatten(2), {}
        cu_seqlens, keep_state, (q, k, v) = context.cu_seqlens, context.keep_state, inputs
        if reverse:
            return self._attend_both(q, k, v, context), {}
        if cu_seqlens is None:
            return self._attend(q, k, v, state, context.mask, keep_state)
        if state is None and not keep_state and _flash_takes(q):
            return self._attend_ragged(q, k, v, cu_seqlens), {}
        return self._attend_packed(q, k, v, state, cu_seqlens, keep_state)  # pyright: ignore[reportCallIssue]

    def mix_in_order(self, inputs: tuple[Tensor, ...], context: Context) -> BTD:
        """Attend in the order of a context: "bidirectional" is one softmax over tokens of both sides."""
        if context.order == "bidirectional":
            q, k, v = inputs
            return self._attend_both(q, k, v, context)
        return super().mix_in_order(inputs, context)

    def finish(self, y: BTD, others: tuple[Tensor, ...] = ()) -> BTD:
        """Project the heads' outputs."""
        del others
        return self.o_proj(y)

    def _attend_both(self, q: Queries, k: Keys, v: Keys, context: Context) -> BTD:
        """Attend to tokens of both sides, or of the right side in reverse order, within the window; [B, T, D]."""
        is_full = context.order == "bidirectional"
        if not q.shape[1]:
            return q.flatten(2)
        cu_seqlens, valid = context.cu_seqlens, context.mask
        if cu_seqlens is not None and is_full and _flash_takes(q):
            return self._attend_ragged(q, k, v, cu_seqlens, is_full)
        if is_full and cu_seqlens is None and self.window_size is None:
            # a sequence of padding alone sees all of it: a row without a key would be NaN
            keys = None if valid is None else (valid | ~valid.any(1, keepdim=True))[:, None, None]
            return self._dot_product(q, k, v, keys, is_causal=False)
        row = torch.arange(q.shape[1], device=q.device)
        place = row.unsqueeze(0) if valid is None else valid.long().cumsum(1)
        seen = torch.ones((1, 1, 1), dtype=torch.bool, device=q.device)
        if not is_full or self.window_size is not None:
            # distances in tokens, so that padding does not count
            distance = place.unsqueeze(1) - place.unsqueeze(2)
            seen = distance.abs() < (self.window_size or q.shape[1] + 1)
            seen = seen if is_full else seen & (distance >= 0)
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)
            seen = seen & (sequence.unsqueeze(0) == sequence.unsqueeze(1))
        if valid is not None:
            # a padded query sees itself: a row without a key would be NaN
            seen = (seen & valid.unsqueeze(1)) | (row.unsqueeze(0) == row.unsqueeze(1))
        return self._dot_product(q, k, v, seen.unsqueeze(1))

    @classmethod
    def memory(cls, options: AttentionOptions) -> Memory:
        """Return "tokens", or "window" if attention has one."""
        return "tokens" if options.window_size is None else "window"

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the cache: keys and values of the places read, which of these are tokens, and how many tokens."""
        limit = None if self.window_size is None else self.window_size - 1
        head = (0, self.num_kv_heads, self.head_size)
        return {
            "key": StateSpec(head, dtype, True, limit),
            "value": StateSpec(head, dtype, True, limit),
            "valid": StateSpec((0,), torch.bool, True, limit),
            "position": StateSpec((), torch.long),
        }

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections."""
        init.draw(self.q_proj, self.k_proj, self.v_proj)
        init.draw_end(self.o_proj)

    def flops(self, seq_len: int) -> int:
        """Count the scores and the weighted sum of values, for the average number of keys that a query sees."""
        window = min(self.window_size or seq_len, seq_len)
        seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
        return round(4 * seen * self.num_heads * self.head_size)

    def flops_in_direction(self, seq_len: int) -> int:
        """Count one softmax over the tokens of both sides; arguments of `Mixer.flops_in_direction`."""
        if self.direction not in ("bidirectional", "2d", "2d-series"):
            return self.flops(seq_len)
        seen = min(seq_len, 2 * (self.window_size or seq_len) - 1)
        return 4 * seen * self.num_heads * self.head_size

    def activation_bytes_in_direction(self, seq_len: int, low: int) -> int:
        """Count the same as for causal attention, and the input in another order; a mask is not counted."""
        copied = low * self.q_proj.in_features if self.direction in ("columns", "columns-reverse") else 0
        return self.activation_bytes(seq_len, low) + copied

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count q, k, v, the output, the sums of the scores, a row of the window's mask, and the rotary angles."""
        kept = 2 * self.num_heads * self.head_size + 2 * self.num_kv_heads * self.head_size + self.num_heads
        window = self.window_size or seq_len
        kept += min(seq_len, max(window, WINDOW_BLOCK) + window - 1) if window < seq_len else 0
        angles = 4 * 2 * self.head_size if self.rope_theta is not None else 0
        return low * kept + angles

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: MixerState | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, MixerState]:
        """Attend within each row and its cache; return y [B, T, D] and the new state."""
        if state is None and mask is None:
            y = self._causal(q, k, v)
            valid = None
        else:
            valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
            if state is not None:
                k = torch.cat([state["key"].to(k.dtype), k], 1)
                v = torch.cat([state["value"].to(v.dtype), v], 1)
                valid = torch.cat([state["valid"], valid], 1)
            y = self._dot_product(q, k, v, self._seen(valid, q.shape[1]).unsqueeze(1))
        if not keep_state:
            return y, {}
        if valid is None:
            valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        count = valid[:, valid.shape[1] - q.shape[1] :].sum(1)
        if state is not None:
            count = count + state["position"]
        if mask is not None:
            k, v, valid = close_gaps(k, v, valid)
        if self.window_size is not None and is_exporting():
            # a fixed number of places, because the length of an exported program is dynamic
            k, v, valid = (self._fill_window(x) for x in (k, v, valid))
        first = self._first_kept(k.shape[1])
        return y, {"key": k[:, first:], "value": v[:, first:], "valid": valid[:, first:], "position": count}

    def _attend_ragged(self, q: Queries, k: Keys, v: Keys, cu_seqlens: Tensor, is_full: bool = False) -> BTD:
        """Attend within packed sequences in one kernel, which reads the bounds on the device; [1, T, D].

        Rows after the last bound belong to no sequence and are not written.
        """
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            # not every version supports grouped keys
            k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        # an upper bound of the longest sequence: blocks beyond the end of a sequence return at once
        bounds, longest = cu_seqlens.int(), q.shape[1]
        window = -1 if self.window_size is None else self.window_size - 1
        y = _flash_ragged(
            q[0], k[0], v[0], bounds, bounds, longest, longest, window_size=(window, window if is_full else 0)
        )
        return y.flatten(1).unsqueeze(0)

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: MixerState | None, cu_seqlens: Tensor, keep_state: bool
    ) -> tuple[Tensor, MixerState]:
        """Attend sequence by sequence, so that masks and scores have the size of one sequence."""
        bounds = cu_seqlens.tolist()
        before = [0] * (len(bounds) - 1) if state is None else state["valid"].sum(1).tolist()
        outputs, keys, values = [], [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            own_k, own_v = k[:, start:stop], v[:, start:stop]
            if state is not None and before[n]:
                # padding comes first in a cache
                own_k = torch.cat([state["key"][n : n + 1, -before[n] :].to(k.dtype), own_k], 1)
                own_v = torch.cat([state["value"][n : n + 1, -before[n] :].to(v.dtype), own_v], 1)
            if start < stop:
                outputs.append(self._causal(q[:, start:stop], own_k, own_v))
            if keep_state:
                first = self._first_kept(own_k.shape[1])
                keys.append(own_k[0, first:])
                values.append(own_v[0, first:])
        y = torch.cat(outputs, 1) if outputs else q.flatten(2)
        if not keep_state:
            return y, {}
        count = cu_seqlens.diff().long()
        if state is not None:
            count = count + state["position"]
        lengths = torch.tensor([key.shape[0] for key in keys], device=q.device, dtype=torch.long)
        longest = max((key.shape[0] for key in keys), default=0)
        valid = torch.arange(longest, device=q.device) >= longest - lengths.unsqueeze(1)
        cache = {"key": stack_caches(keys, k, longest), "value": stack_caches(values, v, longest)}
        return y, {**cache, "valid": valid, "position": count}

    def _causal(self, q: Queries, k: Keys, v: Keys) -> BTD:
        """Attend causally to keys without padding; [B, T, D]."""
        length, count = q.shape[1], k.shape[1]
        if length == count and self.window_size is None:
            return self._dot_product(q, k, v, None)
        if is_exporting():
            # no blocks: their number would be fixed, but the length of an exported program is dynamic
            key = torch.arange(count, device=q.device)
            return self._dot_product(q, k, v, self._reaches(key[count - length :].unsqueeze(1), key))
        if self.window_size is not None and length == count <= self.window_size:
            return self._dot_product(q, k, v, None)
        window = count if self.window_size is None else self.window_size
        block = max(window, WINDOW_BLOCK)
        outputs = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            first, last = max(0, count - length + start - window + 1), count - length + stop
            query = torch.arange(last - stop + start, last, device=q.device)
            seen = self._reaches(query.unsqueeze(1), torch.arange(first, last, device=q.device))
            outputs.append(self._dot_product(q[:, start:stop], k[:, first:last], v[:, first:last], seen))
        return torch.cat(outputs, 1) if outputs else q.flatten(2)

    def _dot_product(self, q: Queries, k: Keys, v: Keys, seen: Tensor | None, is_causal: bool = True) -> BTD:
        """Attend with q [B, T, heads, size] where seen [..., T, keys] is true; None for all, or causal; [B, T, D]."""
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen,
            is_causal=is_causal and seen is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return y.transpose(1, 2).flatten(2)

    def _first_kept(self, count: int) -> int:
        """Return the index of the first key that a later query can see."""
        return 0 if self.window_size is None else max(0, count - self.window_size + 1)

    def _fill_window(self, x: Tensor) -> Tensor:
        """Return the last window_size - 1 places of x [B, places, ...], padded in front with zeros."""
        assert self.window_size is not None
        kept = self.window_size - 1
        return torch.cat([x.new_zeros((x.shape[0], kept, *x.shape[2:])), x], 1).narrow(1, x.shape[1], kept)

    def _seen(self, valid: Tensor, length: int) -> Tensor:
        """Return the mask of keys, valid [B, keys], that the last `length` places see, bool [B, T, keys]."""
        # count tokens, because padding may lie between the cache and new keys
        key = valid.cumsum(1)
        query = key[:, key.shape[1] - length :]
        seen = valid.unsqueeze(1) & self._reaches(query.unsqueeze(2), key.unsqueeze(1))
        # a padded query sees itself: a row without a key would be NaN
        itself = torch.ones_like(seen[0], dtype=torch.bool).triu(key.shape[1] - length).tril(key.shape[1] - length)
        return seen | itself

    def _reaches(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether keys are not after queries, and within the window."""
        seen = key <= query
        return seen if self.window_size is None else seen & (key > query - self.window_size)


def _flash_takes(q: Tensor) -> bool:
    """Return whether torch's kernel for packed sequences supports queries [1, T, heads, size]."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return _flash_ragged is not None and q.is_cuda and fits and q.numel() > 0 and _has_flash(q.device)


@constant_in_traces
def _has_flash(device: torch.device) -> bool:
    # FlashAttention needs Ampere or later
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
