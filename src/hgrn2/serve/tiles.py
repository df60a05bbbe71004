"""Bitwise reproducible reading and decoding: every product has one shape, whatever runs beside it.

Libraries choose the order of a sum by the shape of a product, so a row's last bits depend on how many rows there are.
Here every product of weights has `TILE` rows, and the recurrence runs token by token in the order of the text. A row
may be a token of a prompt, a token that is decoded, or a draft; unused rows hold other tokens, whose values do not
matter to it. So the state and the logits after a token are functions of the tokens before it and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hgrn2.models.backbone import embed
from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.mixer_steps import HGRN2Step
from hgrn2.serve.pool import StatePool

# rows of a product. A multiple of 8: with widths that are multiples of 4, vector loops then have no remainder, for
# which libraries use other code
TILE = 8

# pre-activations of the forget gate and the value of some tokens of one layer, [tokens, H, K]
Ring = list[tuple[Tensor, Tensor]]


class TiledReader:
    """Read tokens in tiles; the same interface as `PackedPrefill`.

    HGRN2 layers compute their products for `TILE` tokens of one text at once. A model with another mixer reads token
    by token, `TILE` texts at once.

    Args:
        step: the decode step.
        pool: the states.
    """

    def __init__(self, step: DecodeStep, pool: StatePool):
        self.step, self.pool = step, pool
        self.model = step.model
        self.device = self.model.lm_head.weight.device
        self.reads_sequences = all(isinstance(layer.mix, HGRN2Step) for layer in step.layers)
        specs = self.model.state_spec()
        self._scratch = None if self.reads_sequences else StatePool(specs, TILE, pool.capacity, self.device)

    def __call__(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Read a part of each prompt; arguments and result of `PackedPrefill`."""
        if self.reads_sequences:
            return torch.stack([self._read(row, tokens) for row, _, tokens in parts])
        found = [self._read_together(parts[i : i + TILE]) for i in range(0, len(parts), TILE)]
        return torch.cat(found)

    def decode(self, tokens: Tensor, count: int) -> Tensor:
        """Read one token of the first rows of the pool.

        Args:
            tokens: [rows] int64, the tokens of all rows of the pool.
            count: number of rows; the rest of the last tile changes too.

        Returns:
            Logits [count, vocab].
        """
        starts = range(0, count, TILE)
        logits = [self.step(tokens[i : i + TILE], self.pool.view(i, i + TILE)) for i in starts]
        return torch.cat(logits)[:count]

    @torch.no_grad()
    def verify(self, row: int, tokens: Sequence[int]) -> tuple[Tensor, list[Ring]]:
        """Compute logits after each of at most `TILE` tokens, without changing the state of the row.

        Args:
            row: row of the pool.
            tokens: tokens after those that the row has read.

        Returns:
            Logits [len(tokens), vocab], and what `commit` needs.
        """
        states = [{"recurrent": state["recurrent"].clone()} for state in self.pool.view(row, row + 1)]
        hidden, ring = self._run(tokens, states)
        return self._logits(hidden)[: len(tokens)], ring

    @torch.no_grad()
    def commit(self, row: int, ring: list[Ring], count: int) -> None:
        """Advance the state of a row by the first tokens of a call of `verify`.

        Args:
            row: row of the pool.
            ring: from `verify`.
            count: number of tokens.
        """
        for layer, state, inputs in zip(self.step.layers, self.pool.view(row, row + 1), ring, strict=True):
            mix, bound = layer.mix, layer.bound
            assert isinstance(mix, HGRN2Step)
            bound = mix.bound(Context(lower_bound=bound))
            for f, v in inputs[:count]:
                # the query does not enter the state
                mix.recur(f, f, v, state["recurrent"], bound)

    @torch.no_grad()
    def _read(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Read tokens of one text; return logits [vocab] after the last."""
        states = self.pool.view(row, row + 1)
        hidden, count = None, 0
        for start in range(0, len(tokens), TILE):
            part = tokens[start : start + TILE]
            hidden, count = self._run(part, states)[0], len(part)
        assert hidden is not None
        return self._logits(hidden)[count - 1]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def _run(self, tokens: Sequence[int], states: Sequence[MixerState]) -> tuple[Tensor, list[Ring]]:
        """Run at most `TILE` tokens of one text; return hidden states [TILE, D] and the inputs of each recurrence."""
        ids = torch.zeros(TILE, dtype=torch.long, device=self.device)
        ids[: len(tokens)] = torch.tensor(list(tokens), device=self.device)
        x = embed(self.model.model.embeddings(ids), self.model.config, False)
        rings: list[Ring] = []
        for layer, state in zip(self.step.layers, states, strict=True):
            mix = layer.mix
            assert isinstance(mix, HGRN2Step)
            q, f, v = mix.project(layer.block.attn_norm(x))
            bound = mix.bound(Context(lower_bound=layer.bound))
            y, ring = torch.zeros_like(v), []
            for t in range(len(tokens)):
                at = slice(t, t + 1)
                y[at] = mix.recur(q[at], f[at], v[at], state["recurrent"], bound)
                ring.append((f[at], v[at]))
            rings.append(ring)
            x = layer.mix_channels(x + mix.finish(y))
        return x, rings

    def _read_together(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Read up to `TILE` texts token by token; return logits [texts, vocab] after their last tokens."""
        scratch = self._scratch
        assert scratch is not None
        for place, (row, read, _) in enumerate(parts):
            scratch.write([place], self.pool.read([row], read))
        states, logits = scratch.view(0, TILE), {}
        for t in range(max(len(tokens) for _, _, tokens in parts)):
            ids = [tokens[t] if t < len(tokens) else 0 for _, _, tokens in parts] + [0] * (TILE - len(parts))
            found = self.step(torch.tensor(ids, device=self.device), states)
            for place, (row, read, tokens) in enumerate(parts):
                if len(tokens) == t + 1:
                    self.pool.write([row], scratch.read([place], read + len(tokens)))
                    logits[place] = found[place]
        return torch.stack([logits[place] for place in range(len(parts))])
