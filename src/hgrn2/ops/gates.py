"""Operands of the recurrence from the inputs of an operator, tile by tile, and gradients of those inputs.

Two operators share one recurrence on (q, k, v, f, c), with f the decay and c = 1 - f:

* `TiedGate`: pre-activations; f = beta + (1 - beta) sigmoid(z), k = c = (1 - beta) sigmoid(-z) (arXiv 2404.07904, eq. 3
  and 6). k is never computed as 1 - f, so it keeps its digits when f is close to 1. With a floor f is not below
  it, and c not above 1 minus it; k is as without.
* `FreeGate`: any key beside any log decay; f = exp(log_f), c = -expm1(log_f).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.ops.call import ScanCall
from hgrn2.ops.tiles import Tile, load, store


class Floor(NamedTuple):
    """A floor under the decay.

    Attributes:
        decay: smallest decay, 0 when there is no floor.
        lost: 1 - decay, to full precision.
    """

    decay: float
    lost: float

    @classmethod
    def of(cls, min_log_decay: float | None) -> Floor:
        """Return the floor with this logarithm."""
        return cls(0.0, 1.0) if min_log_decay is None else cls(math.exp(min_log_decay), -math.expm1(min_log_decay))


def activate(x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Apply "silu", "sigmoid" or "none", into out if given."""
    if activation == "silu":
        return functional.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out)
    if activation == "sigmoid":
        return torch.sigmoid(x, out=out)
    return x if out is None else out.copy_(x)


def activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Return the gradient with respect to x of `activate(x, activation)`."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(x)) if activation == "sigmoid" else grad


@dataclass
class Gated:
    """Operands of a tile, each [chunks, B, H, C, width]; c may be k itself. `raw`: values the gradient needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    c: Tensor
    raw: tuple[Tensor, ...] = ()


def _neutral(tile: Tile, f: Tensor, c: Tensor) -> None:
    """Make the gaps of a tile keep the state as it is."""
    if tile.padding is not None:
        f.masked_fill_(tile.padding, 1)
        c.masked_fill_(tile.padding, 0)


class TiedGate:
    """Gates of `hgrn2_scan`.

    Args:
        call: a call without a key.
    """

    def __init__(self, call: ScanCall):
        q, settings = call.q, call.settings
        self.inputs = (q, call.f, call.v)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.bound = None if call.lower_bound is None else call.lower_bound.to(self.dtype)[:, None, :]
        self.bounds: dict[torch.Size, tuple[Tensor, ...]] = {}
        self.scale, self.floor = settings.scale, Floor.of(settings.min_log_decay)
        self.q_act, self.v_act = settings.q_activation, settings.v_activation

    def allocate_gradients(self) -> None:
        """Allocate the gradients that `backward` stores."""
        self.gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.inputs)
        # a sum over all tokens needs more digits than its terms
        shape = None if self.bound is None else (self.bound.shape[0], self.bound.shape[-1])
        self.d_bound = None if shape is None else torch.zeros(shape, dtype=torch.float64, device=self.inputs[0].device)

    def allocate(self, shape: tuple[int, ...], low: torch.dtype) -> Gated:
        """Allocate the operands of a tile.

        Args:
            shape: chunks, B, H, C of the tile.
            low: dtype of the large matrix products, and of v.
        """
        x, _, i = self.inputs
        q, k, f = (x.new_empty((*shape, x.shape[-1]), dtype=self.dtype) for _ in range(3))
        v = i.new_empty((*shape, i.shape[-1]), dtype=low)
        return Gated(q, k, v, f, c=torch.empty_like(k) if self.floor.decay else k)

    def load(self, gated: Gated, batch: slice, tile: Tile, keep: bool) -> None:
        """Read and activate a tile.

        Args:
            gated: operands from `allocate` for the tile's shape; filled.
            batch: sequences to read.
            tile: rows to read.
            keep: keep the values that `backward` needs.
        """
        q, z, v = (x[batch] for x in self.inputs)
        u = load(q, tile, torch.empty_like(gated.q) if keep else gated.q)
        activate(u, self.q_act, gated.q)
        if self.scale != 1:
            gated.q.mul_(self.scale)
        i = load(v, tile, gated.v if self.v_act == "none" else torch.empty_like(gated.v, dtype=self.dtype))
        gated.v.copy_(activate(i, self.v_act))
        z = load(z, tile, gated.k)
        gate_is_sigmoid = self.bound is None and not self.floor.decay
        p = torch.sigmoid(z, out=gated.f if gate_is_sigmoid or not keep else None)
        torch.neg(z, out=gated.k).sigmoid_()
        if self.bound is not None:
            bound, free = self._spread_bound(z.shape)
            torch.addcmul(bound, free, p, out=gated.f)
            gated.k.mul_(free)
        elif p is not gated.f:
            gated.f.copy_(p)
        _neutral(tile, gated.f, gated.k)
        if self.floor.decay:
            gated.f.clamp_(min=self.floor.decay)
            torch.clamp(gated.k, max=self.floor.lost, out=gated.c)
        gated.raw = (u, i, p) if keep else ()

    def _spread_bound(self, shape: torch.Size) -> tuple[Tensor, ...]:
        """Return the bound and 1 - bound for every row of a chunk: broadcasting them costs several times as much."""
        assert self.bound is not None
        if shape not in self.bounds:
            both = (self.bound, 1 - self.bound)
            self.bounds[shape] = tuple(x.expand(shape[2:]).contiguous() for x in both)
        return self.bounds[shape]

    def backward(self, batch: slice, tile: Tile, gated: Gated, dq: Tensor, dk: Tensor, dv: Tensor, df: Tensor) -> None:
        """Store the gradients of a tile's rows."""
        u, i, p = gated.raw
        # df so far is the gradient through the decay alone; the key adds dk / df = -1
        if self.floor.decay:
            df = df.masked_fill(gated.f <= self.floor.decay, 0)
        df = (df - dk).mul_(gated.k)
        if self.bound is not None:
            assert self.d_bound is not None
            self.d_bound += df.sum((0, 1, 3)) / (1 - self.bound).squeeze(1)
        dz = df.mul_(p)
        if self.scale != 1:
            dq = dq * self.scale
        parts = (activate_backward(dq, u, self.q_act), dz, activate_backward(dv, i, self.v_act))
        for gradient, part in zip(self.gradients, parts, strict=True):
            store(gradient[batch], part, tile)


class FreeGate:
    """Gates of `gated_scan`.

    Args:
        call: a call with a key.
    """

    def __init__(self, call: ScanCall):
        assert call.k is not None
        self.inputs = (call.q, call.k, call.v, call.f)
        self.dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.scale = call.settings.scale

    def allocate_gradients(self) -> None:
        """Allocate the gradients that `backward` stores."""
        self.gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.inputs)

    def allocate(self, shape: tuple[int, ...], low: torch.dtype) -> Gated:
        """Allocate the operands of a tile.

        Args:
            shape: chunks, B, H, C of the tile.
            low: dtype of the large matrix products, and of v.
        """
        dtypes = (self.dtype, self.dtype, low, self.dtype)
        parts = (x.new_empty((*shape, x.shape[-1]), dtype=t) for x, t in zip(self.inputs, dtypes, strict=True))
        q, k, v, f = parts
        return Gated(q, k, v, f, c=torch.empty_like(f))

    def load(self, gated: Gated, batch: slice, tile: Tile, keep: bool) -> None:
        """Read a tile.

        Args:
            gated: operands from `allocate` for the tile's shape; filled.
            batch: sequences to read.
            tile: rows to read.
            keep: ignored: `backward` needs nothing else.
        """
        operands = (gated.q, gated.k, gated.v, gated.f)
        q, k, v, log_f = (load(x[batch], tile, out) for x, out in zip(self.inputs, operands, strict=True))
        torch.mul(q, self.scale, out=gated.q)
        gated.k.copy_(k)
        gated.v.copy_(v)
        torch.expm1(log_f, out=gated.c).neg_()
        torch.exp(log_f, out=gated.f)
        _neutral(tile, gated.f, gated.c)

    def backward(self, batch: slice, tile: Tile, gated: Gated, dq: Tensor, dk: Tensor, dv: Tensor, df: Tensor) -> None:
        """Store the gradients of a tile's rows."""
        if self.scale != 1:
            dq = dq * self.scale
        for gradient, part in zip(self.gradients, (dq, dk, dv, df * gated.f), strict=True):
            store(gradient[batch], part, tile)
