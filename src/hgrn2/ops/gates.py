"""From what an operator is given to what the recurrence needs, a tile at a time, and back for the gradient.

Two operators share one recurrence on (q, k, v, f, c), with f the decay and c = 1 - f:

* `TiedGate`: pre-activations; f = beta + (1 - beta) sigmoid(z), k = c = (1 - beta) sigmoid(-z) (arXiv 2404.07904, eq. 3
  and 6). k is never computed as 1 - f, so it keeps its digits when f is close to 1.
* `FreeGate`: any key beside any log decay; f = exp(log_f), c = -expm1(log_f).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.ops.tiles import Tile, load, store


def activate(x: Tensor, activation: str, inplace: bool = False) -> Tensor:
    """Applies "silu", "sigmoid" or "none", into x itself if asked to."""
    if activation == "silu":
        return functional.silu(x, inplace)
    if activation == "sigmoid":
        return x.sigmoid_() if inplace else torch.sigmoid(x)
    return x


def activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Gradient with respect to x of `activate(x, activation)`."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(x)) if activation == "sigmoid" else grad


@dataclass
class Gated:
    """A tile's operands, each [B, H, chunks, C, width]; `raw` holds what the gradient needs besides."""

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    c: Tensor
    raw: tuple[Tensor, ...]


def _neutral(tile: Tile, f: Tensor, c: Tensor) -> None:
    """Makes places without a row keep the state as it is."""
    if tile.padding is not None:
        f.masked_fill_(tile.padding, 1)
        c.masked_fill_(tile.padding, 0)


class TiedGate:
    """The gates of `hgrn2_scan`."""

    def __init__(
        self,
        q: Tensor,
        z: Tensor,
        v: Tensor,
        lower_bound: Tensor | None,
        scale: float,
        q_act: str,
        v_act: str,
    ):
        self.inputs = (q, z, v)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.bound = None if lower_bound is None else lower_bound.to(self.dtype)[:, None, None, :]
        self.bounds: dict[torch.Size, tuple[Tensor, ...]] = {}
        self.scale, self.q_act, self.v_act = scale, q_act, v_act

    def allocate_gradients(self) -> None:
        """Makes room for what `backward` stores."""
        self.gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.inputs)
        # summed over every token: more digits than the parts
        shape = None if self.bound is None else (self.bound.shape[0], self.bound.shape[-1])
        self.d_bound = None if shape is None else torch.zeros(shape, dtype=torch.float64, device=self.inputs[0].device)

    def load(self, batch: slice, tile: Tile, chunk_size: int, low: torch.dtype, keep: bool) -> Gated:
        """Reads and activates a tile.

        Args:
            batch: which sequences.
            tile: which rows.
            chunk_size: tokens of a chunk.
            low: dtype of the large matrix products, which v goes into.
            keep: keep what `backward` needs; else memory is reused.
        """
        u, z = (load(x[batch], tile, chunk_size, self.dtype) for x in self.inputs[:2])
        i = load(self.inputs[2][batch], tile, chunk_size, low if self.v_act == "none" else self.dtype)
        q, v = activate(u, self.q_act, not keep), activate(i, self.v_act, not keep).to(low)
        if self.scale != 1:
            # u itself is needed when q is u
            q = q.mul_(self.scale) if not keep else q * self.scale
        p = torch.sigmoid(z)
        s = z.neg_().sigmoid_()
        if self.bound is not None:
            bound, free = self._spread_bound(z.shape)
            f = torch.addcmul(bound, free, p, out=None if keep else p)
            k = torch.mul(s, free, out=None if keep else s)
        elif keep and tile.padding is not None:
            f, k = p.clone(), s.clone()
        else:
            f, k = p, s
        _neutral(tile, f, k)
        return Gated(q, k, v, f, k, (u, i, s, p))

    def _spread_bound(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """The bound and 1 - bound for every row of a chunk: broadcast row by row they cost several times as much."""
        assert self.bound is not None
        if shape not in self.bounds:
            heads, _, rows, width = shape[1:]
            both = (self.bound, 1 - self.bound)
            self.bounds[shape] = tuple(x.expand(heads, 1, rows, width).contiguous() for x in both)
        return self.bounds[shape]

    def backward(self, batch: slice, tile: Tile, gated: Gated, dq: Tensor, dk: Tensor, dv: Tensor, df: Tensor) -> None:
        """Stores the gradients of a tile's rows."""
        u, i, s, p = gated.raw
        # df is the path through the decay alone; the key adds dk / df = -1
        df = (df - dk).mul_(s)
        if tile.padding is not None:
            df.masked_fill_(tile.padding, 0)
        if self.bound is not None:
            assert self.d_bound is not None
            self.d_bound += df.sum((0, 2, 3))
            df *= self._spread_bound(df.shape)[1]
        dz = df.mul_(p)
        if self.scale != 1:
            dq = dq * self.scale
        parts = (activate_backward(dq, u, self.q_act), dz, activate_backward(dv, i, self.v_act))
        for gradient, part in zip(self.gradients, parts, strict=True):
            store(gradient[batch], part, tile)


class FreeGate:
    """The gates of `gated_scan`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, scale: float):
        self.inputs = (q, k, v, log_f)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scale = scale

    def allocate_gradients(self) -> None:
        """Makes room for what `backward` stores."""
        self.gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.inputs)

    def load(self, batch: slice, tile: Tile, chunk_size: int, low: torch.dtype, keep: bool) -> Gated:
        """Reads a tile; arguments as `TiedGate.load`."""
        dtypes = (self.dtype, self.dtype, low, self.dtype)
        q, k, v, log_f = (load(x[batch], tile, chunk_size, t) for x, t in zip(self.inputs, dtypes, strict=True))
        if self.scale != 1:
            q = q * self.scale
        f, c = torch.exp(log_f), torch.expm1(log_f).neg_()
        _neutral(tile, f, c)
        return Gated(q, k, v, f, c, ())

    def backward(self, batch: slice, tile: Tile, gated: Gated, dq: Tensor, dk: Tensor, dv: Tensor, df: Tensor) -> None:
        """Stores the gradients of a tile's rows."""
        if self.scale != 1:
            dq = dq * self.scale
        for gradient, part in zip(self.gradients, (dq, dk, dv, df * gated.f), strict=True):
            store(gradient[batch], part, tile)
