"""Mamba's recurrence, tile by tile: decays and states of all tokens, S times the size of the input, are never stored.

The forward pass keeps the state before each tile; the backward pass computes a tile's decays and states again. On a CPU
a tile fits the cache. On a GPU, the Triton kernels of `hgrn2.ops.selective_kernels` take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.call import state_dtype
from hgrn2.ops.checks import check_cu_seqlens
from hgrn2.ops.device import without_autocast
from hgrn2.ops.export import refuse_onnx
from hgrn2.ops.linear_scan import scan_into
from hgrn2.ops.selective_kernels import scan_by_kernels
from hgrn2.ops.transforms import differentiable_by_transforms, map_by_loop, refuse_derivatives
from hgrn2.ops.triton.installed import choose_kernels
from hgrn2.shapes import require_shape

BACKENDS = ("auto", "triton", "tiles")
# numbers of the states of a tile in a row of the batch, L x E x S, and limits of its length L, which does not depend on
# the batch or the length: a traced program may leave these open
_TILE_CPU, _TILE_ACCELERATOR = 1 << 18, 1 << 22
_SHORTEST, _LONGEST = 16, 256


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t and y_t = h_t c_t (arXiv 2312.00752, section 3).

    Gradients flow to every tensor but cu_seqlens, once.

    Args:
        u: [B, T, E], the input.
        dt: [B, T, E], the steps, at least 0; 0 leaves the state as it is.
        a: [E, S], at most 0.
        b: [B, T, S].
        c: [B, T, S].
        initial_state: [N, E, S], float32 (float64 for float64 inputs); None means zeros. N is B, or the number of
            packed sequences.
        cu_seqlens: [N + 1], int32 or int64: bounds of packed sequences, B = 1.
        reverse: run from the last token of each sequence to its first.
        backend: "auto", "triton" (kernels for NVIDIA GPUs) or "tiles" (plain torch). "auto" is "triton" on a GPU where
            Triton is installed, unless inputs are float64.

    Returns:
        y [B, T, E] and the final state [N, E, S], float32 (float64 for float64 inputs).

    Raises:
        UserError: shapes, dtypes or values of cu_seqlens do not fit.
    """
    batch, length, width = _check(u, dt, a, b, c, initial_state, cu_seqlens)
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; wanted one of {', '.join(map(repr, BACKENDS))}", "unknown-name")
    wide = state_dtype(u)
    num = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = u.new_zeros((num, width, a.shape[1]), dtype=wide) if initial_state is None else initial_state.to(wide)
    if isinstance(length, int) and length < 2 and cu_seqlens is None:
        if not length:
            return u.to(wide), state
        now = dt[:, 0].to(wide)
        entering = (now * u[:, 0]).unsqueeze(-1) * b[:, 0].unsqueeze(-2)
        state = torch.exp(now.unsqueeze(-1) * a.to(wide)) * state + entering
        return (state * c).sum(-1).unsqueeze(1), state
    refuse_onnx("selective_scan")
    dtypes = (u.dtype, dt.dtype, a.dtype, b.dtype, c.dtype)
    if choose_kernels(backend, u.device, wide, *dtypes):
        before = None if initial_state is None else state
        return scan_by_kernels(u, dt, a.to(wide), b, c, before, cu_seqlens, reverse)
    if reverse:
        # backwards in memory, sequences run forwards in the opposite order
        u, dt, b, c = (x.flip(1) for x in (u, dt, b, c))
        if cu_seqlens is not None:
            cu_seqlens, state = (length - cu_seqlens).flip(0), state.flip(0)
    y, state, _ = _traced_scan(u, dt, a.to(wide), b, c, state.contiguous(), cu_seqlens)
    if reverse:
        y, state = y.flip(1), state if cu_seqlens is None else state.flip(0)
    return y, state


def _check(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[int, int, int]:
    """Check the arguments, and return the sizes of u."""
    if not isinstance(u, Tensor) or u.dim() != 3 or not u.is_floating_point():
        raise UserError("u is not a floating tensor [B, T, E]")
    batch, length, width = u.shape
    require_shape("dt", dt, "B T E", u.shape)
    if not isinstance(a, Tensor) or a.dim() != 2:
        raise UserError("a is not a tensor [E, S]")
    require_shape("a", a, "E S", (width, a.shape[1]))
    require_shape("b", b, "B T S", (batch, length, a.shape[1]))
    require_shape("c", c, "B T S", (batch, length, a.shape[1]))
    num = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, u, False, "u")
        num = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        require_shape("initial_state", initial_state, "N E S", (num, *a.shape))
    return batch, length, width


class _Packing(NamedTuple):
    """Bounds of packed sequences as tensors.

    Attributes:
        sequence: [T], the sequence of each token.
        is_first: [T], whether a token is the first of its sequence.
        first: [N], the first token of each sequence.
        last: [N], the last one.
        filled: [N], whether a sequence has tokens.
    """

    sequence: Tensor
    is_first: Tensor
    first: Tensor
    last: Tensor
    filled: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int) -> _Packing:
        """Return the packing of sequences of `length` tokens together, without reading values."""
        starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        sequence = torch.searchsorted(stops, torch.arange(length, device=stops.device), right=True)
        filled = stops > starts
        count = torch.zeros(length + 1, device=stops.device, dtype=torch.long).index_add_(0, starts, filled.long())
        return cls(sequence.clamp_max(stops.shape[0] - 1), count[:length] > 0, starts, stops - 1, filled)

    def inside(self, token: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return which sequences have their `token` in start to stop, [N, 1, 1], and its place there."""
        found = self.filled & (token >= start) & (token < stop)
        return found.view(-1, 1, 1), (token - start).clamp(0, stop - start - 1)


def tile_length(width: int, state_size: int, device: str) -> int:
    """Return the tokens of a tile, one of whose states the backward pass keeps.

    Args:
        width: E.
        state_size: S.
        device: type of the device.
    """
    numbers = _TILE_CPU if device == "cpu" else _TILE_ACCELERATOR
    return max(_SHORTEST, min(_LONGEST, numbers // (width * state_size)))


def _tiles(u: Tensor, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield for each tile its number along time, and its rows of the batch and its tokens."""
    rows = [slice(i, i + 1) for i in range(u.shape[0])] if u.device.type == "cpu" else [slice(0, u.shape[0])]
    for row in rows:
        for start in range(0, u.shape[1], length):
            yield start // length, row, slice(start, min(start + length, u.shape[1]))


def _states(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, before: Tensor, state: Tensor, packing: _Packing | None, at: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a tile: decays, these with 0 at first tokens of packed sequences, and states, [B, L, E, S] each."""
    decay = torch.exp(dt.unsqueeze(-1) * a)
    write = (dt * u).unsqueeze(-1) * b.unsqueeze(-2)
    h, cut = torch.empty_like(decay), decay
    if packing is not None:
        is_first = packing.is_first[at].view(1, -1, 1, 1)
        write += (decay * state.index_select(0, packing.sequence[at])).masked_fill(~is_first, 0)
        cut = decay.masked_fill(is_first, 0)
    scan_into(cut, write, before, False, "auto", h)
    return decay, cut, h


@torch.library.custom_op("hgrn2::selective_scan", mutates_args=())
def _scan_op(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, kept = _outputs(u, a, state)
    kept[-2:] = 0
    final, before = state.clone(), state
    packing = None if cu_seqlens is None or not u.shape[1] else _Packing.of(cu_seqlens, u.shape[1])
    for tile, row, at in _tiles(u, tile_length(a.shape[0], a.shape[1], u.device.type)):
        if not tile:
            before = state[row] if packing is None else torch.zeros_like(state[:1])
        kept[tile, row] = before
        now, step, key, query = (x[row, at].to(a.dtype) for x in (u, dt, b, c))
        _, _, h = _states(now, step, a, key, before, state, packing, at)
        with without_autocast(h):
            y[row, at] = torch.matmul(h, query.unsqueeze(-1)).squeeze(-1)
        before = h[:, -1]
        if packing is None:
            final[row] = before
        else:
            found, place = packing.inside(packing.last, at.start, at.stop)
            final = torch.where(found, h[0].index_select(0, place), final)
    return y, final, kept


def _outputs(u: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    # at least two, used or not: the size of a trace is 0, 1 or open
    num_tiles = u.shape[1] // tile_length(a.shape[0], a.shape[1], u.device.type) + 2
    y = torch.empty(u.shape, dtype=a.dtype, device=u.device)
    return y, state.new_empty((num_tiles, u.shape[0], *state.shape[1:]))


@_scan_op.register_fake
def _(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, kept = _outputs(u, a, state)
    return y, torch.empty_like(state), kept


@torch.library.custom_op("hgrn2::selective_scan_backward", mutates_args=())
def _backward_op(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, cu_seqlens: Tensor | None, kept: Tensor,
    dy: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u, dt, a, b, c and the state."""
    du, ddt, db, dc = (torch.empty_like(x) for x in (u, dt, b, c))
    da, d_state, d_after = torch.zeros_like(a), d_final.clone(), d_final
    packing = None if cu_seqlens is None or not u.shape[1] else _Packing.of(cu_seqlens, u.shape[1])
    if packing is not None:
        d_state.masked_fill_(packing.filled.view(-1, 1, 1), 0)
    tiles = list(_tiles(u, tile_length(a.shape[0], a.shape[1], u.device.type)))
    last_tile = tiles[-1][0] if tiles else 0
    for tile, row, at in reversed(tiles):
        now, step, key, query, dout = (x[row, at].to(a.dtype) for x in (u, dt, b, c, dy))
        before = kept[tile, row]
        decay, cut, h = _states(now, step, a, key, before, state, packing, at)
        dh = dout.unsqueeze(-1) * query.unsqueeze(-2)
        if packing is None:
            dh[:, -1] += d_final[row] if tile == last_tile else d_after
        else:
            if tile < last_tile:
                dh[:, -1] += d_after
            found, place = packing.inside(packing.last, at.start, at.stop)
            dh[0].index_add_(0, place, d_final.masked_fill(~found, 0))
        # the gradient of what each token writes
        g = torch.empty_like(dh)
        g[:, -1] = dh[:, -1]
        scan_into(cut[:, 1:], dh[:, :-1], dh[:, -1], True, "auto", g[:, :-1])
        d_after = cut[:, 0] * g[:, 0]
        past = torch.cat([before.unsqueeze(1), h[:, :-1]], 1)
        if packing is None:
            d_state[row] = d_after
        else:
            past = torch.where(
                packing.is_first[at].view(1, -1, 1, 1), state.index_select(0, packing.sequence[at]), past
            )
            found, place = packing.inside(packing.first, at.start, at.stop)
            entering = (decay[0] * g[0]).index_select(0, place)
            d_state += entering.masked_fill(~found, 0)
        d_exponent = past.mul_(g).mul_(decay)
        with without_autocast(h):
            d_written = torch.matmul(g, key.unsqueeze(-1)).squeeze(-1)
            db[row, at] = torch.matmul((step * now).unsqueeze(-2), g).squeeze(-2)
            dc[row, at] = torch.matmul(dout.unsqueeze(-2), h).squeeze(-2)
        du[row, at] = d_written * step
        ddt[row, at] = (d_exponent * a).sum(-1) + d_written * now
        da += d_exponent.mul_(step.unsqueeze(-1)).sum((0, 1))
    return du, ddt, da, db, dc, d_state


@_backward_op.register_fake
def _(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, cu_seqlens: Tensor | None, kept: Tensor,
    dy: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(x) for x in (u, dt, a, b, c, state))  # pyright: ignore[reportReturnType]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _differentiate(ctx: Any, dy: Tensor, d_final: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, kept = ctx.saved_tensors
    *gradients, d_state = _traced_backward(*inputs, kept, dy, d_final)
    return *gradients, d_state, None


_scan_op.register_autograd(_differentiate, setup_context=_set_up)

_FURTHER = "selective_scan has no second derivative, and none in forward mode"
_traced_scan = differentiable_by_transforms(_scan_op, _set_up, _differentiate, lambda *_: _FURTHER)
_traced_backward = refuse_derivatives(_backward_op, _FURTHER)
for _operator in (_scan_op, _backward_op):
    map_by_loop(_operator)
