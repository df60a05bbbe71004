"""Read one text with the logits of its next token, for callers who choose the tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hgrn2.models import HGRN2LM, ModelState
from hgrn2.models.sampling import PREFILL_TOKENS
from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.graphs import DecodeGraphs
from hgrn2.serve.pool import StatePool
from hgrn2.serve.prefill import PackedPrefill
from hgrn2.serve.sampling import SamplingRows


class Reader(Protocol):
    """Protocol of the state of one text.

    Attributes:
        state: the state after the tokens read; setting it continues another text.
    """

    state: Any

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens, at least one; return logits [1, vocab] after the last, which the next call may overwrite."""
        ...


class PlainReader:
    """Read with the model's own forward pass, which leaves its weights where they are.

    Args:
        model: the model, in evaluation mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self.state: Any = model.init_state(1)

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens, at least one; return logits [1, vocab] after the last."""
        ids, hidden = torch.tensor([list(tokens)], device=self.model.lm_head.weight.device), None
        for part in ids.split(PREFILL_TOKENS, 1):
            hidden, self.state = self.model.hidden_states(part, self.state)
        assert hidden is not None
        return self.model.lm_head(hidden[:, -1])


class EngineReader:
    """Read with the decode step of the engine, on a GPU as a CUDA graph.

    Args:
        model: the model, in evaluation mode, whose state has a fixed size or a window. Weights of joined projections
            become views of one tensor, as in `hgrn2.serve.Engine`.
    """

    def __init__(self, model: HGRN2LM):
        device, specs = model.lm_head.weight.device, model.state_spec()
        capacity = max((spec.limit or 0 for layer in specs for spec in layer.values() if spec.grows), default=0)
        self._pool = StatePool(specs, 1, capacity, device)
        self._step = DecodeStep(model, self._pool.grows)
        self._prefill = PackedPrefill(model, self._pool)
        self._rows = SamplingRows(1, model.config.vocab_size, device)
        self._graphs = DecodeGraphs(self._step, self._pool, self._rows, 1) if device.type == "cuda" else None
        # places of a window in use
        self._num_read = 0

    @property
    def state(self) -> ModelState:
        """A copy of the state after the tokens read."""
        return self._pool.read([0], self._num_read)

    @state.setter
    def state(self, state: ModelState) -> None:
        self._pool.write([0], state)
        layers = zip(state.layers, self._pool.grows, strict=True)
        self._num_read = max((layer[name].shape[1] for layer, names in layers for name in names), default=0)

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens, at least one; return logits [1, vocab] after the last, which the next call may overwrite."""
        if len(tokens) == 1:
            self._rows.tokens.fill_(tokens[0])
            self._num_read += 1
            if self._graphs is not None:
                return self._graphs.decode(1)
            return self._step(self._rows.tokens, self._pool.view(0, 1))
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[start : start + PREFILL_TOKENS]
            logits = self._prefill([(0, self._num_read, part)])
            self._num_read += len(part)
        return logits  # pyright: ignore[reportPossiblyUnboundVariable]


def fast_reader(model: HGRN2LM) -> Reader:
    """Return an `EngineReader`, or a `PlainReader` for a model that keeps all tokens, which has no fixed size."""
    specs = [spec for layer in model.state_spec() for spec in layer.values()]
    keeps_all = any(spec.grows and spec.limit is None for spec in specs)
    return PlainReader(model) if keeps_all else EngineReader(model)
