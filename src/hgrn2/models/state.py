"""The state of a whole model: one value, made of plain named tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.errors import UserError


@dataclass(frozen=True)
class ModelState:
    """What the model remembers of the tokens before.

    Attributes:
        layers: per layer, its mixer's tensors by name; the first axis of each is N, the sequences.
    """

    layers: tuple[dict[str, Tensor], ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """The state with a function applied to every tensor."""
        return ModelState(tuple({name: function(x) for name, x in layer.items()} for layer in self.layers))

    def detach(self) -> ModelState:
        """The same numbers without their history."""
        return self.map(torch.Tensor.detach)

    def select(self, index: Tensor) -> ModelState:
        """The states of some sequences.

        Args:
            index: [M] int64, sequences in the wanted order; -1 stands for a fresh start (zeros).
        """
        fresh = index < 0
        if not bool(fresh.any()):
            return self.map(lambda x: x.index_select(0, index))
        index = index.clamp_min(0)

        def pick(x: Tensor) -> Tensor:
            chosen = x.index_select(0, index)
            return chosen.masked_fill(fresh.view(-1, *[1] * (x.dim() - 1)), 0)

        return self.map(pick)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, "layers.3.recurrent", for saving."""
        return {f"layers.{i}.{name}": x.contiguous() for i, layer in enumerate(self.layers) for name, x in layer.items()}

    def load(self, tensors: dict[str, Tensor]) -> ModelState:
        """A state like this one with the numbers of saved tensors.

        Raises:
            UserError: names or shapes that do not belong to this model.
        """
        wanted = self.tensors()
        if wanted.keys() != tensors.keys():
            missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
            raise UserError(f"state: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}; it is of another model")
        for name, x in wanted.items():
            # a cache of attention grows along its second axis
            growing = name.rsplit(".", 1)[1] in ("key", "value", "valid")
            if x.shape[2:] != tensors[name].shape[2:] or (x.shape[1:2] != tensors[name].shape[1:2] and not growing):
                raise UserError(f"state: {name} has shape {list(tensors[name].shape)}, wanted {list(x.shape)}; it is of another model")
        return ModelState(
            tuple(
                {name: tensors[f"layers.{i}.{name}"].to(x) for name, x in layer.items()} for i, layer in enumerate(self.layers)
            )
        )
