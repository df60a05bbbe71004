"""Draw tokens for the rows of a batch on its device, each row with its own settings and random numbers."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.serve.requests import MOST_LOGPROBS, RequestSampling


class Features(NamedTuple):
    """Steps of sampling that at least one row of a batch needs; they do not change the other rows.

    Attributes:
        draws: random numbers, as some temperature is above 0.
        filters: top-k, top-p or min-p.
        penalties: penalties.
        bias: a bias of logits.
        logprobs: log-probabilities.
    """

    draws: bool = False
    filters: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: bool = False

    def union(self, other: Features) -> Features:
        """Return what either needs."""
        return Features(*(a or b for a, b in zip(self, other, strict=True)))


class Drawn(NamedTuple):
    """Tokens drawn for a batch.

    Attributes:
        tokens: [B] int64; -1 where the logits are not finite.
        logprob: [B] float32, or None.
        top_tokens: [B, K] int64, the likeliest tokens, or None.
        top_logprobs: [B, K] float32, or None.
    """

    tokens: Tensor
    logprob: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


class SamplingRows:
    """Settings of sampling of every row, in tensors at fixed addresses.

    Args:
        num_rows: number of rows.
        vocab_size: number of tokens.
        device: device of the tensors.

    Attributes:
        tokens: [rows] int64, the token drawn last.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str):
        self.num_rows, self.vocab_size, self.device = num_rows, vocab_size, torch.device(device)
        floats = torch.zeros(6, num_rows, device=device)
        self._floats = floats
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = floats
        whole = torch.zeros(4, num_rows, dtype=torch.long, device=device)
        self._whole = whole
        self.top_k, self.seed, self.number, self.tokens = whole
        # tables of the vocabulary exist once a request needs them
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None

    def set(self, row: int, sampling: RequestSampling, seed: int, prompt: list[int]) -> None:
        """Begin a continuation in a row.

        Args:
            row: the row.
            sampling: its settings.
            seed: seed of its random numbers, in 64 bits.
            prompt: tokens before it.
        """
        s = sampling
        floats = [s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
        self._floats[:, row] = torch.tensor(floats, device=self.device)
        # no filter is a filter that keeps everything
        top_k = s.top_k if 0 < s.top_k < self.vocab_size else self.vocab_size
        self._whole[:, row] = torch.tensor([top_k, seed, 0, 0], device=self.device)
        if s.has_penalties and self._seen is None:
            shape = (self.num_rows, self.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        if s.logit_bias and self._bias is None:
            self._bias = torch.zeros((self.num_rows, self.vocab_size), device=self.device)
        if self._seen is not None and self._counts is not None:
            self._seen[row] = False
            self._counts[row] = 0
            if s.has_penalties and prompt:
                self._seen[row, torch.tensor(prompt, device=self.device)] = True
        if self._bias is not None:
            self._bias[row] = 0
            if s.logit_bias:
                ids = torch.tensor(list(s.logit_bias), device=self.device)
                self._bias[row, ids] = torch.tensor(list(s.logit_bias.values()), dtype=torch.float, device=self.device)

    def replay(self, row: int, written: list[int]) -> None:
        """Count tokens that the continuation in a row had written before."""
        self.number[row] = len(written)
        if self._counts is not None and written:
            ids = torch.tensor(written, device=self.device)
            self._counts[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for x in (self._floats, self._whole):
            x[:, target] = x[:, source]
        for x in (self._seen, self._counts, self._bias):
            if x is not None:
                x[target] = x[source]

    def save(self) -> Tensor:
        """Return a copy of what `draw` changes without penalties."""
        return self._whole.clone()

    def restore(self, saved: Tensor) -> None:
        """Set what `save` returned."""
        self._whole.copy_(saved)

    def draw(self, logits: Tensor, start: int, features: Features) -> Drawn:
        """Draw a token for adjacent rows, and keep it as their last one.

        Args:
            logits: [B, vocab] of the rows start to start + B; further columns are ignored.
            start: the first row.
            features: what the rows need.
        """
        rows = slice(start, start + logits.shape[0])
        logits = logits[:, : self.vocab_size]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        model = logits
        if features.penalties:
            logits = self._penalize(logits, rows)
        if features.bias and self._bias is not None:
            logits = logits + self._bias[rows]
        top, tokens = logits.max(-1)
        if features.draws:
            drawn = self._draw(logits, top, rows, features.filters)
            tokens = torch.where(self.temperature[rows] > 0, drawn, tokens)
        # NaN is the largest, infinite logits without a bias are the model's
        tokens = torch.where(top.isfinite(), tokens, -1)
        self.tokens[rows] = tokens.clamp_min(0)
        self.number[rows] += 1
        if features.penalties and self._counts is not None:
            self._counts[rows].scatter_add_(1, self.tokens[rows].unsqueeze(1), self._ones(logits.shape[0]))
        if not features.logprobs:
            return Drawn(tokens)
        logprobs = model.log_softmax(-1)
        best = logprobs.topk(min(MOST_LOGPROBS, self.vocab_size), -1)
        chosen = logprobs.gather(-1, self.tokens[rows].unsqueeze(1)).squeeze(1)
        return Drawn(tokens, chosen, best.indices, best.values)

    def _ones(self, count: int) -> Tensor:
        return torch.ones((count, 1), dtype=torch.int32, device=self.device)

    def _penalize(self, logits: Tensor, rows: slice) -> Tensor:
        assert self._seen is not None
        assert self._counts is not None
        counts = self._counts[rows]
        penalty = self.repetition[rows].unsqueeze(1)
        seen = self._seen[rows] | (counts > 0)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits = logits - self.presence[rows].unsqueeze(1) * (counts > 0)
        return logits - self.frequency[rows].unsqueeze(1) * counts

    def _draw(self, logits: Tensor, top: Tensor, rows: slice, filters: bool) -> Tensor:
        # subtract the largest logit, and limit the temperature, to avoid inf - inf
        logits = (logits - top.unsqueeze(1)) / self.temperature[rows].clamp_min(1e-6).unsqueeze(1)
        if filters:
            logits = logits.masked_fill(self._left_out(logits, rows), -torch.inf)
        sums = logits.softmax(-1).cumsum(-1)
        point = uniform(self.seed[rows], self.number[rows]).to(sums.dtype) * sums[:, -1]
        # the first token whose sum is above the point has a probability above 0
        return torch.searchsorted(sums, point.unsqueeze(1), right=True).squeeze(1).clamp_max(logits.shape[1] - 1)

    def _left_out(self, logits: Tensor, rows: slice) -> Tensor:
        """Return where logits [B, vocab], divided by the temperature, are filtered out, bool [B, vocab]."""
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        gone = rank >= self.top_k[rows].unsqueeze(1)
        p = ordered.masked_fill(gone, -torch.inf).softmax(-1)
        top_p = self.top_p[rows].unsqueeze(1)
        # drop tokens after those that reach top_p
        gone = gone | ((p.cumsum(-1) - p >= top_p) & (top_p < 1))
        p = ordered.masked_fill(gone, -torch.inf).softmax(-1)
        gone = gone | (p < self.min_p[rows].unsqueeze(1) * p[:, :1])
        # always keep the likeliest
        gone = gone & (rank > 0)
        return torch.zeros_like(gone).scatter(-1, order, gone)


def features_of(sampling: RequestSampling, logprobs: bool) -> Features:
    """Return what a request needs."""
    return Features(
        sampling.temperature > 0, sampling.has_filters, sampling.has_penalties, bool(sampling.logit_bias), logprobs
    )


def seed_of(sampling: RequestSampling, index: int) -> int:
    """Return the seed of a continuation as a signed 64-bit integer; the continuations of a request differ.

    Args:
        sampling: settings of the request.
        index: the continuation, from 0, whose seed is the request's own.
    """
    seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
    seed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    return seed - 2**64 if seed >= 2**63 else seed


def uniform(seed: Tensor, number: Tensor) -> Tensor:
    """Return random numbers in [0, 1), float64 [B], that depend on nothing but the arguments.

    They are the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over a seed and a counter.

    Args:
        seed: [B] int64.
        number: [B] int64, a counter.
    """
    x = _mix(_mix(seed) + number * _signed(0x9E3779B97F4A7C15) + _signed(0x9E3779B97F4A7C15))
    return _shift(x, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # the shift of signed integers repeats the sign
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
