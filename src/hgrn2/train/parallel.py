"""Protocol of training in several processes: the only place where they share counts, losses, norms and files.

`Trainer` and `start_run` call it wherever several ranks must agree or only one may act. In a single process, every
method is the identity, communicates nothing and never waits for the device. `hgrn2.train.distributed` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hgrn2.ops.pieces import PieceGroup
from hgrn2.tasks.base import Task
from hgrn2.train.checkpoint import Checkpoint, CheckpointStore, load_checkpoint
from hgrn2.train.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The examples that a rank trains on.

    Attributes:
        rank: number of the share, 0 <= rank < num_ranks.
        num_ranks: number of shares of a batch.
        pieces: the ranks that have the same examples, each with a piece of every sequence; None if it has them alone.
    """

    rank: int = 0
    num_ranks: int = 1
    pieces: PieceGroup | None = None


class Parallel(Protocol):
    """The ranks of a run; every rank calls the same methods in the same order."""

    is_main: bool
    """Whether this rank writes files and shows progress."""
    rank: int
    """Number of this rank, 0 <= rank < num_ranks."""
    num_ranks: int
    """Number of ranks, each of which computes its part of every batch."""
    signal_repeat_s: float
    """Seconds within which a further signal counts as the same request: launchers pass signals on."""

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds only its part of the weights."""
        ...

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this rank; of several GPUs, its own."""
        ...

    def share(self, config: TrainConfig) -> Share:
        """Return the examples of this rank.

        Raises:
            UserError: `context_parallel` does not fit the number of ranks.
        """
        ...

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that facts, such as settings and versions, are the same on all ranks.

        Raises:
            UserError: they are not.
        """
        ...

    def prepare(self, model: nn.Module, task: Task, config: TrainConfig) -> nn.Module:
        """Return the model, with its weights split if `config.shard`; called before the optimizer is made.

        Raises:
            UserError: the model or the task does not support it.
        """
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Compute gradients of a batch's part of the loss.

        After the last batch of a step, the gradients are those of the sum over all ranks.

        Args:
            loss: a scalar, already divided by the number of targets on all ranks.
            is_last: whether this is the last batch of the step; only then do ranks need to communicate.
        """
        ...

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Return the sums of counts over the ranks, such as targets and tokens of a step."""
        ...

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of scalars over the ranks, such as the loss of a step; stays on the device."""
        ...

    def global_norm(self, norm: Tensor) -> Tensor:
        """Return the norm of the whole gradient, from the norm of this rank's part."""
        ...

    def from_main(self, value: T) -> T:
        """Return the main rank's value, such as the elapsed time, on every rank."""
        ...

    def first_of(self, value: T | None) -> T | None:
        """Return the value of the first rank that has one, such as a signal that one of them received."""
        ...

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call a function on the main rank; other ranks wait, return None, and raise if it raised there."""
        ...

    def save(self, store: CheckpointStore, **parts: Any) -> None:
        """Write a checkpoint of the whole model.

        Args:
            store: the checkpoints of the run.
            **parts: arguments of `CheckpointStore.save`, as this rank has them.
        """
        ...

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint written by any number of ranks."""
        ...

    def own_seed(self, seed: int) -> int:
        """Return the seed of the random numbers that ranks draw for their own parts of a batch, such as dropout."""
        ...

    def join_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the states carried by the streams of all ranks, in the order of one process; {} on other ranks.

        Args:
            tensors: tensors of this rank, with an axis of streams first.
        """
        ...

    def own_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of the states carried by all streams; inverts `join_streams`."""
        ...

    def advise(self, advice: str) -> None:
        """Set the end of the message that is shown if a rank ends before the others, such as how to resume."""
        ...


class OneProcess:
    """Training in a single process, with nothing to share."""

    is_main = True
    rank = 0
    num_ranks = 1
    is_sharded = False
    signal_repeat_s = 0.0

    def device(self, device: torch.device) -> torch.device:
        """Return the device."""
        return device

    def share(self, config: TrainConfig) -> Share:
        """Return all examples."""
        del config
        return Share()

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def prepare(self, model: nn.Module, task: Task, config: TrainConfig) -> nn.Module:
        """Return the model."""
        del task, config
        return model

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Compute the gradients."""
        del is_last
        loss.backward()

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Return the counts."""
        return counts

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values."""
        return dict(values)

    def global_norm(self, norm: Tensor) -> Tensor:
        """Return the norm."""
        return norm

    def from_main(self, value: T) -> T:
        """Return the value."""
        return value

    def first_of(self, value: T | None) -> T | None:
        """Return the value."""
        return value

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call the function."""
        return work()

    def save(self, store: CheckpointStore, **parts: Any) -> None:
        """Write the checkpoint."""
        store.save(**parts)

    def load(self, path: Path) -> Checkpoint:
        """Read the checkpoint."""
        return load_checkpoint(path)

    def own_seed(self, seed: int) -> int:
        """Return the seed."""
        return seed

    def join_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors."""
        return dict(tensors)

    def own_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors."""
        return dict(tensors)

    def advise(self, advice: str) -> None:
        """Do nothing."""


ONE_PROCESS = OneProcess()
