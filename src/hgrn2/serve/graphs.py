"""The decode step as CUDA graphs, one for each of a few batch sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.pool import StatePool
from hgrn2.serve.sampling import Drawn, Features, SamplingRows

_WARM_UPS = 2


def graph_sizes(most: int) -> list[int]:
    """Return the batch sizes with a graph: powers of two up to 16, then multiples of 16, 32 or 64, and the most."""
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, 128, 32), *range(128, most + 1, 64)]
    return sorted({size for size in sizes if size < most} | {most})


class DecodeGraphs:
    """Replays of the decode step; a batch is padded to the next size, whose further rows must be free.

    Args:
        step: the decode step.
        pool: the states, whose first rows are changed while the graphs are captured.
        rows: settings of sampling, and the tokens that are read.
        max_batch: the largest batch.
    """

    def __init__(self, step: DecodeStep, pool: StatePool, rows: SamplingRows, max_batch: int):
        self.step, self.pool, self.rows = step, pool, rows
        self.sizes = graph_sizes(max_batch)
        self._steps: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._draws: dict[tuple[int, Features], tuple[torch.cuda.CUDAGraph, Drawn]] = {}
        self._memory = torch.cuda.graph_pool_handle()
        # the largest first: the others fit the memory that it leaves
        for size in reversed(self.sizes):
            self._steps[size] = self._capture(size)
        for layer in pool.layers:
            for x in layer.values():
                x.zero_()

    def size_of(self, count: int) -> int:
        """Return the size of the graph that runs a batch."""
        return next(size for size in self.sizes if size >= count)

    def decode(self, count: int) -> Tensor:
        """Read the last tokens of the first rows; return logits [size, vocab] at a fixed address."""
        graph, logits = self._steps[self.size_of(count)]
        graph.replay()
        return logits

    def draw(self, logits: Tensor, features: Features) -> Drawn:
        """Draw tokens from the logits of `decode`; the result is overwritten by the next call."""
        if features.penalties or features.bias:
            # their tables appear with the first request that needs them
            return self.rows.draw(logits, 0, features)
        key = (logits.shape[0], features)
        if key not in self._draws:
            self._draws[key] = self._capture_draw(logits, features)
        graph, drawn = self._draws[key]
        graph.replay()
        return drawn

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        tokens, states = self.rows.tokens[:size], self.pool.view(0, size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.step(tokens, states)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self.step(tokens, states)
        return graph, logits

    def _capture_draw(self, logits: Tensor, features: Features) -> tuple[torch.cuda.CUDAGraph, Drawn]:
        before = self.rows.save()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.rows.draw(logits, 0, features)
        torch.cuda.current_stream().wait_stream(stream)
        self.rows.restore(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            drawn = self.rows.draw(logits, 0, features)
        return graph, drawn
