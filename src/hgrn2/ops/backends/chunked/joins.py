"""The chunkwise form of the gated scan in plain torch, for every device.

The recurrence S_t = Diag(f_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t (arXiv 2404.07904, section 3) is computed for
chunks of tokens with matrix products. The usual way takes cumulative sums of log f and exponentials of their
differences, which overflow, or lose digits, when gates are extreme. Here nothing is divided and no logarithm is taken:
inside a chunk, neighbouring blocks of 1, 2, 4, ... tokens are joined in pairs. When the earlier block E of a pair meets
the later block L,

    scores(L, E) = (q_L * prefix_L) (k_E * suffix_E)^T

where prefix_L[t] is the product of f from the start of L through t, and suffix_E[s] the product of f after s to the end
of E. Both are products of numbers in [0, 1], so every score keeps its relative precision for any gate down to f = 0.
After a join q_L is multiplied by the whole decay of E, and k_E by that of L, as the next pair, twice as large, needs.
After the last join q carries the decay since the chunk's start and k the decay to the chunk's end, which is what the
state between chunks needs.

In a product of many gates just below 1 the rounding errors would add up. So the complement
c = 1 - f is joined along with the decay (c = c_E + f_E c_L, a sum of non-negative numbers) and used where it is small.

The gradient runs the joins backwards; it is also correct at f = 0. A scan in reverse time swaps the roles of E and L.

Letters: M = sequences * heads * chunks of a tile, C = chunk size, K and V as in `hgrn2.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.ops.gates import Gated

# after the join of blocks of this size the complement, where small, replaces the product of decays
COMPLEMENT_FROM_BLOCK = 8
COMPLEMENT_BELOW = 0.5


def _block(x: Tensor, size: int, which: int) -> Tensor:
    """Return a view [M * pairs, size, W] of x [M, n, W]: the first (0) or second (1) block of rows of each pair."""
    m, rows, width = x.shape
    return x.as_strided((m * rows // (2 * size), size, width), (2 * size * width, width, 1), which * size * width)


def _score_block(scores: Tensor, size: int, late: int, early: int) -> Tensor:
    """Return a view of scores [M, C, C]: rows of the later and columns of the earlier block of every pair."""
    m, chunk, _ = scores.shape
    shape, strides = (m, chunk // (2 * size), size, size), (chunk * chunk, 2 * size * (chunk + 1), chunk, 1)
    return scores.as_strided(shape, strides, late * size * chunk + early * size)


@dataclass
class _Join:
    """One join of n pairs of an earlier block E and a later one L: views of the operands, and memory for results.

    Attributes:
        q_l: [n, size, K].
        k_e: [n, size, K].
        k_e_t: [n, K, size], k_e transposed.
        decays: decays of E and of L, [n, 1, K].
        complements: their complements.
        decay: [n, 1, K], decay of the pair; over that of E unless the gradient needs it.
        complement: complement of the pair.
        products: [n, size, size].
        scores: [M, n / M, size, size], destination of the products.
        before: copies of q_l and k_e before the join, if the gradient needs them.
    """

    q_l: Tensor
    k_e: Tensor
    k_e_t: Tensor
    decays: tuple[Tensor, Tensor]
    complements: tuple[Tensor, Tensor]
    decay: Tensor
    complement: Tensor
    products: Tensor
    scores: Tensor
    before: tuple[Tensor, Tensor] | None


class Joins:
    """Joins the blocks of every chunk of a tile, from single tokens to the whole chunk.

    One instance serves all tiles of a shape: allocating memory and views for every tile would cost a tenth of the pass.

    Attributes:
        gated: the operands.
        scores: [M, C, C] in the low dtype, scores[t, s] of the tokens of one chunk, 0 where s comes after t.
        q: [M, C, K], the query times the decay since the chunk's start.
        k: [M, C, K], the key times the decay to the chunk's end.
        keep: [M, K], 0 or 1, the rounded decay across the chunk.
        change: [M, K], the rest of this decay: the sum of both is more precise than a single number.
    """

    def __init__(self, gated: Gated, low: torch.dtype, reverse: bool, keep: bool):
        """Allocate memory.

        Args:
            gated: the operands, read by `run`.
            low: dtype of the large matrix products.
            reverse: time runs from the last row to the first.
            keep: keep what the gradient needs, the operands included; else they are overwritten.
        """
        self.gated = gated
        self.operands = q, k, f = gated.q.flatten(0, 2), gated.k.flatten(0, 2), gated.f.flatten(0, 2)
        m, chunk, width = q.shape
        self.order = early, late = (1, 0) if reverse else (0, 1)
        self.q, self.k = (torch.empty_like(q), torch.empty_like(k)) if keep else (q, k)
        self.scores = q.new_zeros((m, chunk, chunk), dtype=low)
        self.diagonal = self.scores.diagonal(dim1=1, dim2=2)
        self.joins: list[_Join] = []
        decay, complement = f.view(-1, 1, width), gated.c.view(-1, 1, width)
        size = 1
        while size < chunk:
            q_l, k_e = _block(self.q, size, late), _block(self.k, size, early)
            n = q_l.shape[0]
            decays, complements = ((x[early::2], x[late::2]) for x in (decay, complement))
            decay = q.new_empty((n, 1, width)) if keep else decays[0]
            # the first complement may be k itself
            complement = q.new_empty((n, 1, width)) if keep or size == 1 else complements[0]
            products = q.new_empty((n, size, size))
            scores = _score_block(self.scores, size, late, early)
            before = (torch.empty_like(q_l), torch.empty_like(k_e)) if keep else None
            self.joins.append(_Join(q_l, k_e, k_e.mT, decays, complements, decay, complement, products, scores, before))
            size *= 2
        self.decay, self.complement = decay.squeeze(1), complement.squeeze(1)

    def run(self) -> None:
        """Join the operands."""
        q, k, f = self.operands
        self.diagonal.copy_((q * k).sum(-1))
        torch.mul(q, f, out=self.q)
        if self.k is not k:
            self.k.copy_(k)
        for join in self.joins:
            q_l, k_e, (decay_e, decay_l) = join.q_l, join.k_e, join.decays
            size = q_l.shape[1]
            if size == 1:
                # a batch of 1 x 1 matrix products would cost a call each
                torch.sum(q_l * k_e, -1, keepdim=True, out=join.products)
            else:
                torch.bmm(q_l, join.k_e_t, out=join.products)
            join.scores.copy_(join.products.view(join.scores.shape))
            if join.before is not None:
                join.before[0].copy_(q_l)
                join.before[1].copy_(k_e)
            # compute first: the complement may share memory with the key, and the decays may be overwritten below
            torch.addcmul(join.complements[0], decay_e, join.complements[1], out=join.complement)
            q_l *= decay_e
            k_e *= decay_l
            torch.mul(decay_e, decay_l, out=join.decay)
            if size == COMPLEMENT_FROM_BLOCK:
                small = join.complement < COMPLEMENT_BELOW
                torch.where(small, 1 - join.complement, join.decay, out=join.decay)
        small = self.complement < COMPLEMENT_BELOW
        self.keep, self.change = small.to(self.decay.dtype), torch.where(small, -self.complement, self.decay)

    def backward(self, d_scores: Tensor, dq: Tensor, dk: Tensor, d_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient of `run`; the instance must have been made with `keep`.

        Args:
            d_scores: [M, C, C] in the low dtype; values above the diagonal are not read.
            dq: [M, C, K], gradient of the joined q; changed in place.
            dk: [M, C, K], gradient of the joined k; changed in place.
            d_decay: [M, K], gradient of the decay across the chunk.

        Returns:
            Gradients of the operands q, k and f.
        """
        q, k, f = self.operands
        m, size, width = q.shape
        early, late = self.order
        d_decay = d_decay.unsqueeze(1)
        for join in reversed(self.joins):
            size //= 2
            assert join.before is not None
            (q_l, k_e), (decay_e, decay_l) = join.before, join.decays
            dq_l, dk_e = _block(dq, size, late), _block(dk, size, early)
            d_before = q.new_empty((m, q.shape[1] // size, width))
            d_joined = d_decay.reshape(-1, 1, width)
            torch.addcmul((dq_l * q_l).sum(1, keepdim=True), d_joined, decay_l, out=_block(d_before, 1, early))
            torch.addcmul((dk_e * k_e).sum(1, keepdim=True), d_joined, decay_e, out=_block(d_before, 1, late))
            d_decay = d_before
            # small products are not faster in low precision
            d_products = _score_block(d_scores, size, late, early).reshape(-1, size, size).to(q.dtype)
            from_k, from_q = _products(d_products, k_e), _products(d_products.mT, q_l)
            torch.addcmul(from_k, dq_l, decay_e, out=dq_l)
            torch.addcmul(from_q, dk_e, decay_l, out=dk_e)
        d_diagonal = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1).to(q.dtype)
        df = torch.addcmul(d_decay, dq, q)
        dq = torch.addcmul(d_diagonal * k, dq, f)
        dk = dk.addcmul_(d_diagonal, q)
        return dq, dk, df


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return matrix products of a [N, n, n] with b [N, n, W]; element-wise for n = 1."""
    return a * b if a.shape[-1] == 1 else torch.bmm(a, b)
