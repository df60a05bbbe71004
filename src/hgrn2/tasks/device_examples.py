"""Examples that stay on a GPU, shared by all runs of a process, so that no step waits for the CPU to draw them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hgrn2.tasks.generators import SyntheticOptions, generate
from hgrn2.tasks.generators.base import IGNORE, TRAINING

# sets kept at a time: the runs of a comparison go through a few tasks in order
_MAX_SETS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceExamples:
    """A fixed set of examples with equally many targets each, on a device.

    Attributes:
        inputs: [N, T] int32.
        positions: [N, P] int32, positions of the targets in their example.
        targets: [N, P] int32.
    """

    inputs: Tensor
    positions: Tensor
    targets: Tensor

    @classmethod
    def draw(
        cls, options: SyntheticOptions, num: int, seed: int, device: torch.device, stream: int = TRAINING
    ) -> DeviceExamples:
        """Return the first examples of a seed."""
        inputs, targets = generate(options, num, seed, stream=stream)
        positions = np.nonzero(targets != IGNORE)[1].reshape(num, -1)
        found = inputs, positions, np.take_along_axis(targets, positions, 1)
        return cls(*(torch.from_numpy(x.astype(np.int32)).to(device) for x in found))


@dataclass(frozen=True)
class RowsBatch:
    """A batch as rows of a fixed set; `hgrn2.tasks.synthetic.SyntheticBatch` has its examples.

    Attributes:
        rows: [B] int64, on the device of the examples.
        examples: the set.
    """

    rows: Tensor
    examples: DeviceExamples

    @property
    def num_tokens(self) -> int:
        """Number of inputs."""
        return len(self.rows) * self.examples.inputs.shape[1]

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return len(self.rows) * self.examples.targets.shape[1]

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs [B, T], flat positions of the targets [M] and targets [M], int64 on the device.

        Only launches: it can be captured in a CUDA graph.
        """
        inputs, positions, targets = (
            x.index_select(0, self.rows).long()
            for x in (self.examples.inputs, self.examples.positions, self.examples.targets)
        )
        starts = torch.arange(0, inputs.numel(), inputs.shape[1], device=inputs.device)
        return inputs, (positions + starts[:, None]).flatten(), targets.flatten()


class Shared(Generic[T]):
    """Cache of objects by key, shared by the threads of a process; each is made once, and the oldest are dropped."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._found: dict[str, T] = {}
        self._making: dict[str, threading.Lock] = {}

    def get(self, key: str, make: Callable[[], T]) -> T:
        """Return the object of a key; other threads that need it wait until it is made."""
        with self._lock:
            own = self._making.setdefault(key, threading.Lock())
        with own:
            if key not in self._found:
                made = make()
                with self._lock:
                    self._found[key] = made
                    while len(self._found) > self._most:
                        oldest = next(iter(self._found))
                        del self._found[oldest], self._making[oldest]
            return self._found[key]


_sets: Shared[DeviceExamples] = Shared(_MAX_SETS)


def shared_examples(
    options: SyntheticOptions, num: int, seed: int, device: torch.device, stream: int = TRAINING
) -> DeviceExamples:
    """Return a fixed set that all runs of the process on this device use.

    Args:
        options: options of the generator.
        num: number of examples.
        seed: seed of the examples.
        device: device of the tensors.
        stream: 0 for training, 1 for validation.
    """

    def make() -> DeviceExamples:
        examples = DeviceExamples.draw(options, num, seed, device, stream)
        if device.type == "cuda":
            # runs on other streams use it
            torch.cuda.current_stream(device).synchronize()
        return examples

    return _sets.get(f"{options!r} {num} {seed} {device} {stream}", make)
