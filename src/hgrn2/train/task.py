"""What the loop asks of a task: batches, a loss, a metric. The loop knows nothing else about it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """A kind of training: language modelling, classification, a synthetic task.

    The loop calls next_batch, then loss once for every batch in the order they came. evaluate and sample run
    in the model's evaluation mode, without gradients, with generators of their own.
    """

    def next_batch(self) -> Any:
        """The next batch, on any device; loss moves it. Batches never end."""
        ...

    def num_tokens(self, batch: Any) -> int:
        """Tokens (or examples) the batch spends of the budget."""
        ...

    def num_targets(self, batch: Any) -> int:
        """Targets the batch's loss is a sum over."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss summed over the targets: a float32 scalar with a gradient."""
        ...

    def step_skipped(self) -> None:
        """The step was not finite: forget whatever it may have spoilt, such as a carried state."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the held-out data; "val_loss" is among them and decides which checkpoint is best."""
        ...

    def sample(self, model: nn.Module) -> str | None:
        """Something for people to look at, or None."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as JSON values, of constant size."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors carried from step to step; empty for most tasks."""
        ...

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put back what state_dict and state_tensors gave."""
        ...
