"""The protocol of a task: batches, a loss, a metric and a report. The training loop uses nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from hgrn2.constraints import check_fields
from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM, HGRN2Config

# writes text: from the model and a prompt to the prompt and its continuation
Sampler = Callable[[nn.Module, str], str]


class Metric(NamedTuple):
    """The figure of a validation that decides which checkpoint is best.

    Attributes:
        name: key of `Task.evaluate`, e.g. "val_loss" or "val_accuracy".
        higher_is_better: its direction.
    """

    name: str
    higher_is_better: bool = False

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value is finite and better than the best so far; None: there is none yet."""
        if not math.isfinite(value):
            return False
        return best is None or (value > best if self.higher_is_better else value < best)


class StepLoss(NamedTuple):
    """The loss of one batch, and whatever else is summed over its targets.

    Attributes:
        loss_sum: loss summed over the targets, a float32 scalar with a gradient.
        sums: further scalars summed over the targets, by name, e.g. "accuracy": the number of correct targets. Their
            means over a step's targets go into its record.
    """

    loss_sum: Tensor
    sums: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class TaskOptions:
    """Options of a task apart from those of training; a frozen dataclass with a default for every field but paths.

    Fields are checked as `hgrn2.constraints.check_fields` says.
    """

    what: ClassVar[str] = "task options"
    """Name of the options in messages."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file or folder."""

    def __post_init__(self) -> None:
        check_fields(self, self.what)

    @property
    def tokens_per_example(self) -> int:
        """Tokens that one example of a batch spends of the budget."""
        return 1


@dataclass(frozen=True)
class TaskContext:
    """Batch size, seed, device and data that a task is built with.

    Attributes:
        batch_size: examples in a batch.
        seed: decides the order of the data.
        device: where the model is.
        model_config: configuration of the model; None if the task builds its own.
        data: a `hgrn2.data.prepared.PreparedData` for tasks that read text, otherwise None.
        sampler: writes samples; None: no samples.
    """

    batch_size: int = 1
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model_config: Any = None
    data: Any = None
    sampler: Sampler | None = None


class ReportFigure(NamedTuple):
    """A figure of a validation, as a report shows it.

    Attributes:
        key: of `Task.evaluate`.
        label: its name in words.
        style: format in the summary.
        note: explains it.
        table_style: format in the table of validations.
    """

    key: str
    label: str
    style: str
    note: str
    table_style: str


@dataclass(frozen=True)
class TaskReport:
    """How a report speaks of a task.

    Attributes:
        model: what a model trained on it is.
        unit: the unit of its loss.
        figures: figures of a validation, the most telling first.
    """

    model: str = "A model"
    unit: str = "nats per target"
    figures: tuple[ReportFigure, ...] = ()


class Task(Protocol):
    """A kind of training: language modelling, classification, a synthetic task.

    The loop calls next_batch, then loss once for every batch in the order they came. evaluate and sample run
    in the model's evaluation mode, without gradients, with generators of their own.
    """

    name: ClassVar[str]
    """Its name on the command line and in config.json."""
    Options: ClassVar[type[TaskOptions]]
    """Its options."""
    metric: ClassVar[Metric]
    """Figure that decides which checkpoint is best."""
    reads_text: ClassVar[bool]
    """Whether it is trained on prepared text, which `TaskContext.data` holds."""
    report: ClassVar[TaskReport]
    """How a report describes it."""

    @classmethod
    def build(cls, options: Any, context: TaskContext) -> Self:
        """Make the task.

        Args:
            options: an instance of `Options`.
            context: batch size, seed, device, data.
        """
        ...

    @classmethod
    def model_settings(cls, options: Any) -> dict[str, Any]:
        """Return the settings of a model that follow from the options, such as vocab_size."""
        ...

    @classmethod
    def build_model(cls, options: Any, config: HGRN2Config) -> nn.Module:
        """Make the model on the CPU, with new weights; it has `parameter_roles`."""
        ...

    @property
    def carries_state(self) -> bool:
        """Whether a step depends on tensors of the one before: then a skipped step is known before the next begins."""
        ...

    def next_batch(self) -> Any:
        """Return the next batch, on any device; loss moves it. Batches never end."""
        ...

    def num_tokens(self, batch: Any) -> int:
        """Return the tokens (or examples) that the batch spends of the budget."""
        ...

    def num_targets(self, batch: Any) -> int:
        """Return the targets that the batch's loss is a sum over."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor | StepLoss:
        """Return the loss summed over the targets, a float32 scalar with a gradient, alone or with further sums."""
        ...

    def step_skipped(self) -> None:
        """Forget whatever a step that was not finite may have spoilt, such as a carried state."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Return figures on held-out data; "val_loss" (the mean loss of a target) and the metric are among them."""
        ...

    def sample(self, model: nn.Module) -> str | None:
        """Return something for people to look at, or None."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as JSON values of constant size."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return tensors carried from step to step; empty for most tasks."""
        ...

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put back what state_dict and state_tensors gave."""
        ...


class TaskBase:
    """Defaults for the parts of a task that most tasks do not need.

    The rest is up to the task: name, Options, metric, build, next_batch, num_tokens, num_targets, loss, evaluate,
    state_dict and load_state.
    """

    reads_text: ClassVar[bool] = False
    report: ClassVar[TaskReport] = TaskReport()
    carries_state: Any = False

    @classmethod
    def model_settings(cls, options: Any) -> dict[str, Any]:
        """Return no settings."""
        del options
        return {}

    @classmethod
    def build_model(cls, options: Any, config: HGRN2Config) -> nn.Module:
        """Make a language model."""
        del options
        return HGRN2LM(config)

    def step_skipped(self) -> None:
        """Nothing is carried from step to step."""

    def sample(self, model: nn.Module) -> str | None:
        """Return None: there is nothing to look at."""
        del model

    def state_tensors(self) -> dict[str, Tensor]:
        """Return no tensors."""
        return {}


def check_figures(task: Task, figures: Mapping[str, Any]) -> None:
    """Raise a UserError if a validation lacks a figure that the protocol asks for."""
    for name in ("val_loss", task.metric.name):
        if name not in figures:
            raise UserError(
                f"task {task.name!r}: evaluate returns no {name!r} (found {', '.join(figures) or 'nothing'}); add it",
                "incomplete",
            )
