"""States of many sequences in tensors of fixed size, made from the `state_spec` of each mixer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgrn2.models.state import ModelState
from hgrn2.nn.mixers.base import MixerState, StateSpec
from hgrn2.shapes import describe


class StatePool:
    """Rows of states at fixed addresses; a row is assigned, copied and freed without an allocation.

    A tensor that grows with the tokens (keys and values of attention) has a fixed number of places in each row. They
    fill from the end, as in the caches of `hgrn2.models.ModelState`: unused places come first and are not valid.

    Args:
        specs: from `HGRN2LM.state_spec`.
        num_rows: number of rows.
        capacity: places of a tensor that grows without a limit; tensors with a limit have at most that many.
        device: device of the tensors.

    Attributes:
        layers: for each layer, tensors [num_rows, ...] by name.
        grows: names of the tensors of each layer that grow.
    """

    def __init__(
        self, specs: Sequence[Mapping[str, StateSpec]], num_rows: int, capacity: int, device: torch.device | str
    ):
        self.num_rows, self.capacity = num_rows, capacity
        self.grows = tuple(frozenset(name for name, spec in layer.items() if spec.grows) for layer in specs)

        def allocate(spec: StateSpec) -> Tensor:
            shape = spec.shape
            if spec.grows:
                shape = (capacity if spec.limit is None else min(spec.limit, capacity), *shape[1:])
            return torch.zeros((num_rows, *shape), dtype=spec.dtype, device=device)

        self.layers = tuple({name: allocate(spec) for name, spec in layer.items()} for layer in specs)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.nbytes for layer in self.layers for x in layer.values())

    def bytes_of(self, num_tokens: int) -> int:
        """Return the bytes of a copy of one row that has read a number of tokens."""
        sizes = 0
        for layer, growing in zip(self.layers, self.grows, strict=True):
            for name, x in layer.items():
                row = x[0].nbytes
                sizes += row // max(x.shape[1], 1) * min(num_tokens, x.shape[1]) if name in growing else row
        return sizes

    def clear(self, row: int) -> None:
        """Set a row to the start of a sequence."""
        for layer in self.layers:
            for x in layer.values():
                x[row].zero_()

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for layer in self.layers:
            for x in layer.values():
                x[target].copy_(x[source])

    def view(self, start: int, stop: int) -> list[MixerState]:
        """Return the tensors of adjacent rows, [stop - start, ...], which share the pool's memory."""
        return [{name: x[start:stop] for name, x in layer.items()} for layer in self.layers]

    def read(self, rows: Sequence[int], num_tokens: int) -> ModelState:
        """Copy some rows into a new state.

        Args:
            rows: the rows.
            num_tokens: tokens that the longest of them has read; places beyond them are left out.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device=self._device)
        layers = []
        for layer, growing in zip(self.layers, self.grows, strict=True):
            found = {}
            for name, x in layer.items():
                used = x[:, x.shape[1] - min(num_tokens, x.shape[1]) :] if name in growing else x
                found[name] = used.index_select(0, index)
            layers.append(found)
        return ModelState(tuple(layers))

    def write(self, rows: Sequence[int], state: ModelState) -> None:
        """Copy a state over some rows.

        Args:
            rows: the rows, as many as the state has sequences.
            state: a state of this model, on any device.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device=self._device)
        assert state.num_sequences in (0, len(rows)), describe(state)
        for layer, growing, new in zip(self.layers, self.grows, state.layers, strict=True):
            for name, x in layer.items():
                value = new[name].to(x.device, x.dtype)
                if name not in growing:
                    x.index_copy_(0, index, value)
                    continue
                value = value[:, max(0, value.shape[1] - x.shape[1]) :]
                unused = x.shape[1] - value.shape[1]
                x[:, :unused].index_fill_(0, index, 0)
                x[:, unused:].index_copy_(0, index, value)

    @property
    def _device(self) -> torch.device:
        return next((x.device for layer in self.layers for x in layer.values()), torch.device("cpu"))
