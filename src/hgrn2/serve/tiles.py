"""Bitwise reproducible reading and decoding: every product has one shape, whatever runs beside it.

Libraries choose the order of a sum by the shape of a product, so a row's last bits depend on how many rows there are.
Here every product of weights has `TILE` rows, and the recurrence runs token by token in the order of the text. A row
may be a token of a prompt, a token that is decoded, or a draft; unused rows hold other tokens, whose values do not
matter to it. So the state and the logits after a token are functions of the tokens before it and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hgrn2.models.backbone import embed
from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.mixer_steps import HGRN2Step
from hgrn2.serve.pool import StatePool

# rows of a product, and of what is computed element by element: a multiple of 16, so that vector loops have no
# remainder, for which libraries use other code
TILE = 16
# more rows at once for prompts, where this machine's library gives the same bits as for TILE
_WIDER = (128, 64, 32)

# query, gate, key and value of some tokens of one layer, each [tokens, H, K]
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


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
        self.width = self._find_width() if self.reads_sequences else TILE

    @torch.no_grad()
    def _find_width(self) -> int:
        """Return the most rows for which every product gives the bits of tiles, tried on random rows."""
        generator = torch.Generator().manual_seed(0)
        size, weight = self.model.config.hidden_size, self.model.lm_head.weight
        x = torch.randn((max(_WIDER), size), generator=generator).to(weight.device, weight.dtype)

        def results(rows: Tensor) -> Iterator[Tensor]:
            for layer in self.step.layers:
                mix = layer.mix
                assert isinstance(mix, HGRN2Step)
                projected = mix.project(layer.block.attn_norm(rows))
                yield from mix.operands(*projected, mix.bound(Context(lower_bound=layer.bound)))
                yield mix.finish(projected[2])
                yield layer.mix_channels(rows)

        def agree(width: int) -> bool:
            tiles = [results(x[i : i + TILE].clone()) for i in range(0, width, TILE)]
            parts = zip(results(x[:width].clone()), *tiles, strict=True)
            return all(torch.equal(whole, torch.cat(rows)) for whole, *rows in parts)

        return next((width for width in _WIDER if agree(width)), TILE)

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
            count: number of rows; the rest of the last tile may change too.

        Returns:
            Logits [count, vocab].
        """
        logits = []
        for start in range(0, count, TILE):
            ids = tokens[start : start + TILE]
            if self.reads_sequences:
                used = min(TILE, count - start)
                logits.append(self._decode_rows(ids, used, self.pool.view(start, start + used)))
            else:
                logits.append(self.step(ids, self.pool.view(start, start + TILE)))
        return torch.cat(logits)[:count]

    @torch.no_grad()
    def _decode_rows(self, ids: Tensor, used: int, states: Sequence[MixerState]) -> Tensor:
        """Read one token of each row of a tile, of which the first `used` have a state; return logits [TILE, vocab].

        All but the recurrence needs every row of the tile; a row of the state does not depend on how many there are.
        """

        def recur(mix: HGRN2Step, operands: Operands, state: Tensor) -> Tensor:
            y = torch.zeros_like(operands[3])
            y[:used] = mix.advance(*(x[:used] for x in operands), state)  # pyright: ignore[reportCallIssue]
            return y

        return self._logits(self._run(ids, states, recur))

    @torch.no_grad()
    def verify(self, row: int, tokens: Sequence[int]) -> tuple[Tensor, list[Operands]]:
        """Compute logits after each of at most `TILE` tokens, without changing the state of the row.

        Args:
            row: row of the pool.
            tokens: tokens after those that the row has read.

        Returns:
            Logits [len(tokens), vocab], and what `commit` needs.
        """
        states = [{"recurrent": state["recurrent"].clone()} for state in self.pool.view(row, row + 1)]
        ring: list[Operands] = []
        hidden = self._run(self._padded(tokens, TILE), states, partial(_in_order, len(tokens), ring))
        return self._logits(hidden)[: len(tokens)], ring

    @torch.no_grad()
    def commit(self, row: int, ring: list[Operands], count: int) -> None:
        """Advance the state of a row by the first tokens of a call of `verify`.

        Args:
            row: row of the pool.
            ring: from `verify`.
            count: number of tokens.
        """
        for layer, state, operands in zip(self.step.layers, self.pool.view(row, row + 1), ring, strict=True):
            assert isinstance(layer.mix, HGRN2Step)
            _in_order(count, None, layer.mix, operands, state["recurrent"])

    @torch.no_grad()
    def _read(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Read tokens of one text; return logits [vocab] after the last."""
        states, start = self.pool.view(row, row + 1), 0
        while True:
            # whole wide parts first, then tiles
            rows = self.width if len(tokens) - start >= self.width else TILE
            part = tokens[start : start + rows]
            hidden = self._run(self._padded(part, rows), states, partial(_in_order, len(part), None))
            start += len(part)
            if start == len(tokens):
                return self._logits(hidden[-TILE:] if rows > TILE else hidden)[(len(part) - 1) % TILE]

    def _padded(self, tokens: Sequence[int], rows: int) -> Tensor:
        return torch.tensor([*tokens, *[0] * (rows - len(tokens))], device=self.device)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def _run(
        self, ids: Tensor, states: Sequence[MixerState], recur: Callable[[HGRN2Step, Operands, Tensor], Tensor]
    ) -> Tensor:
        """Run the layers on one token of each row.

        Args:
            ids: [rows] int64.
            states: for each layer the states that `recur` takes.
            recur: runs the recurrence of a layer on the operands of all rows; returns y [rows, H, V].

        Returns:
            Hidden states [rows, D].
        """
        x = embed(self.model.model.embeddings(ids), self.model.config, False)
        for layer, state in zip(self.step.layers, states, strict=True):
            mix = layer.mix
            assert isinstance(mix, HGRN2Step)
            q, f, v = mix.project(layer.block.attn_norm(x))
            operands = mix.operands(q, f, v, mix.bound(Context(lower_bound=layer.bound)))
            y = recur(mix, operands, state["recurrent"]).to(q.dtype)
            x = layer.mix_channels(x + mix.finish(y))
        return x

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


def _in_order(count: int, ring: list[Operands] | None, mix: HGRN2Step, operands: Operands, state: Tensor) -> Tensor:
    """Run the recurrence of one text, state [1, H, K, V], on the first `count` rows, and add the operands to a ring."""
    y = torch.zeros_like(operands[3])
    for t in range(count):
        y[t] = mix.advance(*(x[t : t + 1] for x in operands), state)[0]  # pyright: ignore[reportCallIssue]
    if ring is not None:
        ring.append(operands)
    return y
