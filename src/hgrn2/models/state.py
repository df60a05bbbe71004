"""The state of a model, an immutable collection of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.export
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import StateSpec
from hgrn2.quantities import plural


@dataclass(frozen=True)
class ModelState:
    """State of a model after the tokens it has read; never changed in place.

    Attributes:
        layers: for each layer, the tensors of its mixer by name; their first axis is N, the sequences.
    """

    layers: tuple[dict[str, Tensor], ...]

    def __repr__(self) -> str:
        """Return layers, sequences, bytes, dtypes and device in one line."""
        tensors = [x for layer in self.layers for x in layer.values()]
        parts = [plural(len(self.layers), "layer")]
        if tensors:
            dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()})
            parts += [plural(self.num_sequences, "sequence"), f"{self.num_bytes:,} bytes", *dtypes]
            parts.append(str(tensors[0].device))
        else:
            parts.append("no tensors kept")
        return f"ModelState({', '.join(parts)})"

    @property
    def num_sequences(self) -> int:
        """N, the number of sequences; 0 without tensors."""
        return next((x.shape[0] for layer in self.layers for x in layer.values()), 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """Apply a function to every tensor and return the new state."""
        return ModelState(tuple({name: function(x) for name, x in layer.items()} for layer in self.layers))

    def detach(self) -> ModelState:
        """Detach the state from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ModelState:
        """Move the state to a device; dtypes are unchanged: each tensor already has the one its layer needs.

        Args:
            device: the target device.
            non_blocking: do not wait for the copy, as in `torch.Tensor.to`.
        """
        return self.map(lambda x: x.to(torch.device(device), non_blocking=non_blocking))

    def select(self, index: Tensor) -> ModelState:
        """Return the states of some sequences.

        Args:
            index: [M] int64 on the state's device, the sequences in the wanted order; -1 means a fresh state (zeros).

        Raises:
            UserError: index is not a 1-D integer tensor.
        """
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            found = f"{list(index.shape)} of {index.dtype}" if isinstance(index, Tensor) else repr(index)
            raise UserError(f"index is {found}; wanted a tensor [M] of int64, the sequences to pick")
        # do not look at the values, which would wait for the GPU
        fresh, index = index < 0, index.clamp_min(0)

        def pick(x: Tensor) -> Tensor:
            chosen = x.index_select(0, index)
            return chosen.masked_fill(fresh.view(-1, *[1] * (x.dim() - 1)), 0)

        return self.map(pick)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, such as "layers.3.recurrent", for saving; layers count from 0."""
        return {
            f"layers.{i}.{name}": x.contiguous() for i, layer in enumerate(self.layers) for name, x in layer.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ModelState:
        """Rebuild a state from the output of `tensors`."""
        layers: dict[int, dict[str, Tensor]] = {}
        for key, x in tensors.items():
            _, index, name = key.split(".")
            layers.setdefault(int(index), {})[name] = x
        return cls(tuple(layers[i] for i in range(len(layers))))

    def check(self, specs: Sequence[Mapping[str, StateSpec]], num_sequences: int) -> ModelState:
        """Check that the state belongs to a model, and return it in the dtypes of that model.

        Args:
            specs: from the model's `state_spec`.
            num_sequences: sequences that the state should hold.

        Raises:
            UserError: names or shapes differ from the model's.
        """
        wanted = {f"layers.{i}.{name}": spec for i, layer in enumerate(specs) for name, spec in layer.items()}
        found = self.tensors()
        if wanted.keys() != found.keys():
            raise UserError(
                f"state has {plural(len(found), 'tensor')}, but this model's state has {len(wanted)}, with other "
                "names; it belongs to another model",
                "mismatch",
            )
        for name, spec in wanted.items():
            if found[name].dim() == 0 or found[name].shape[0] != num_sequences or not spec.matches(found[name]):
                shape = [num_sequences, *spec.shape]
                raise UserError(
                    f"state: {name} has shape {list(found[name].shape)}, wanted {shape}; it belongs to another model",
                    "mismatch",
                )
        return ModelState.from_tensors({name: found[name].to(spec.dtype) for name, spec in wanted.items()})


# torch.export and torch.func take a state as input and output
torch.export.register_dataclass(ModelState, serialized_type_name="hgrn2.models.state.ModelState")
