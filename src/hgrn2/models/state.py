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
        return {
            f"layers.{i}.{name}": x.contiguous() for i, layer in enumerate(self.layers) for name, x in layer.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ModelState:
        """The inverse of `tensors`."""
        layers: dict[int, dict[str, Tensor]] = {}
        for key, x in tensors.items():
            _, index, name = key.split(".")
            layers.setdefault(int(index), {})[name] = x
        return cls(tuple(layers[i] for i in range(len(layers))))

    def check_like(self, template: ModelState) -> ModelState:
        """This state, cast to the template's dtypes and device, if it belongs to the template's model.

        Args:
            template: from the model's `init_state`, for as many sequences.

        Raises:
            UserError: names or shapes that do not belong to this model.
        """
        wanted, found = template.tensors(), self.tensors()
        if wanted.keys() != found.keys():
            raise UserError(
                f"state: {len(found)} tensors whose names are not the model's {len(wanted)}; it is of another model"
            )
        for name, x in wanted.items():
            shape = list(x.shape)
            # a cache of attention grows along its second axis
            if name.rsplit(".", 1)[1] in ("key", "value", "valid"):
                shape[1] = found[name].shape[1] if found[name].dim() > 1 else shape[1]
            if list(found[name].shape) != shape:
                raise UserError(
                    f"state: {name} has shape {list(found[name].shape)}, wanted {shape}; it is of another model"
                )
        return ModelState.from_tensors({name: found[name].to(x) for name, x in wanted.items()})
