"""The protocol of a task: batches, a loss, a metric and a report. The training loop uses nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.ops.pieces import PieceGroup
from hgrn2.shapes import describe
from hgrn2.tasks.options import TaskOptions

# generates text: maps a model and a prompt to the prompt with its continuation
Sampler = Callable[[nn.Module, str], str]


class Metric(NamedTuple):
    """The validation figure that selects the best checkpoint.

    Attributes:
        name: key of `Task.evaluate`, e.g. "val_loss" or "val_accuracy".
        higher_is_better: whether larger values are better.
    """

    name: str
    higher_is_better: bool = False

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value is finite and better than the best so far, if there is one."""
        if not math.isfinite(value):
            return False
        return best is None or (value > best if self.higher_is_better else value < best)


class StepLoss(NamedTuple):
    """The loss of one batch, with further sums over its targets.

    Attributes:
        loss_sum: loss summed over the targets, a float32 scalar with a gradient.
        sums: further scalars summed over the targets, by name, e.g. "accuracy": the number of correct targets. Their
            means over a step's targets go into its record.
    """

    loss_sum: Tensor
    sums: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class TaskContext:
    """Batch size, seed, device and data that a task is built with.

    Attributes:
        batch_size: number of examples per batch, of this process.
        seed: seed of the data order.
        device: the device of the model.
        model_config: configuration of the model; None if the task builds its own.
        data: a `hgrn2.data.prepared.PreparedData` for tasks that read text, otherwise None.
        sampler: generates text samples; None means no samples.
        rank: number of the process that trains on these batches, 0 <= rank < num_ranks.
        num_ranks: number of processes that train on different examples.
        pieces: the ranks that share every sequence; None if a rank has whole sequences.
        grad_accumulation: batches of a step.
    """

    batch_size: int = 1
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model_config: Any = None
    data: Any = None
    sampler: Sampler | None = None
    rank: int = 0
    num_ranks: int = 1
    pieces: PieceGroup | None = None
    grad_accumulation: int = 1


class ReportFigure(NamedTuple):
    """Presentation of a figure of a validation in a report.

    Attributes:
        key: of `Task.evaluate`. Keys that continue it, such as "val_accuracy_length_128" for "val_accuracy", are
            shown in the same way.
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
    """Description of a task for a report.

    Attributes:
        model: description of a model trained on the task.
        unit: unit of the loss.
        figures: figures of a validation, the most important first.
        counted: unit of the budget, in the plural.
        pictures: names of the pictures of `Task.draw` that the report shows, with captions.
        opening: Python code that opens the model of a run, with {run} for its folder; None for a language model.
    """

    model: str = "A model"
    unit: str = "nats per target"
    figures: tuple[ReportFigure, ...] = ()
    counted: str = "tokens"
    pictures: tuple[tuple[str, str], ...] = ()
    opening: str | None = None


class Task(Protocol):
    """A kind of training: language modelling, classification, a synthetic task.

    The loop calls next_batch, then loss once for every batch, in order. evaluate and sample run in the model's
    evaluation mode, without gradients, with separate random generators.
    """

    name: ClassVar[str]
    """Name on the command line and in config.json."""
    Options: ClassVar[type[TaskOptions]]
    """Class of the options."""
    metric: ClassVar[Metric]
    """Figure that decides which checkpoint is best."""
    reads_text: ClassVar[bool]
    """Whether it trains on prepared text, passed as `TaskContext.data`."""
    report: ClassVar[TaskReport]
    """How a report describes it."""
    splits_batches: ClassVar[bool]
    """Whether it reads only its own part if several processes train together (`TaskContext.rank`). Otherwise every
    process makes the batches of all and keeps its own."""
    splits_sequences: ClassVar[bool]
    """Whether it gives every rank its piece of a sequence (`TaskContext.pieces`)."""
    calls_forward: ClassVar[bool]
    """Whether `loss` and `evaluate` only call the model itself, so that its weights can be split over processes."""

    @classmethod
    def build(cls, options: Any, context: TaskContext) -> Self:
        """Make the task.

        Args:
            options: an instance of `Options`.
            context: batch size, seed, device and data.
        """
        ...

    @classmethod
    def model_settings(cls, options: Any) -> dict[str, Any]:
        """Return the model settings that follow from the options, such as vocab_size."""
        ...

    @classmethod
    def make_model_config(cls, model: str | None, settings: Mapping[str, Any]) -> Any:
        """Return the configuration of a preset with settings; None if the task uses language models.

        The configuration must have `to_dict`.

        Args:
            model: name of the preset; None means the default.
            settings: settings of the model, which override the preset.
        """
        ...

    @classmethod
    def read_model_config(cls, settings: Mapping[str, Any]) -> Any:
        """Return the configuration of a saved model."""
        ...

    @classmethod
    def build_model(cls, options: Any, config: Any) -> nn.Module:
        """Make the model on the CPU with initial weights; it must have `parameter_roles`."""
        ...

    @property
    def carries_state(self) -> bool:
        """Whether a step depends on tensors of the previous one; the loop then waits for each step."""
        ...

    def next_batch(self) -> Any:
        """Return the next batch, on any device; `loss` moves it. Batches never end."""
        ...

    def num_tokens(self, batch: Any) -> int:
        """Return the number of tokens (or examples) of the budget that the batch uses."""
        ...

    def num_targets(self, batch: Any) -> int:
        """Return the number of targets that the batch's loss sums over."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor | StepLoss:
        """Return the loss summed over the targets, a float32 scalar with a gradient, alone or with further sums."""
        ...

    def step_skipped(self) -> None:
        """Discard everything that a non-finite step may have corrupted, such as a carried state."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Return figures on held-out data, including "val_loss" (mean loss per target) and the metric."""
        ...

    def sample(self, model: nn.Module) -> str | None:
        """Return a text sample, or None."""
        ...

    def draw(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write pictures and other results into the run folder at the end of a run; return the pictures.

        The model is in evaluation mode, without gradients.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as JSON values of constant size."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return tensors carried between steps; empty for most tasks."""
        ...

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the results of state_dict and state_tensors."""
        ...


class TaskBase:
    """Defaults for the parts of a task that most tasks do not need.

    A task defines the rest: name, Options, metric, build, next_batch, num_tokens, num_targets, loss, evaluate,
    state_dict and load_state.
    """

    reads_text: ClassVar[bool] = False
    report: ClassVar[TaskReport] = TaskReport()
    splits_batches: ClassVar[bool] = False
    splits_sequences: ClassVar[bool] = False
    calls_forward: ClassVar[bool] = False
    carries_state: Any = False

    @classmethod
    def model_settings(cls, options: Any) -> dict[str, Any]:
        """Return no settings."""
        del options
        return {}

    @classmethod
    def make_model_config(cls, model: str | None, settings: Mapping[str, Any]) -> Any:
        """Return None: models are those of `HGRN2Config`."""
        del model, settings

    @classmethod
    def read_model_config(cls, settings: Mapping[str, Any]) -> Any:
        """Return an `HGRN2Config`."""
        return HGRN2Config.from_dict(dict(settings))

    @classmethod
    def build_model(cls, options: Any, config: Any) -> nn.Module:
        """Make a language model."""
        del options
        return HGRN2LM(config)

    def step_skipped(self) -> None:
        """Do nothing: no tensors are carried between steps."""

    def sample(self, model: nn.Module) -> str | None:
        """Return None: there are no samples."""
        del model

    def draw(self, model: nn.Module, folder: Path) -> list[Path]:
        """Draw nothing."""
        del model, folder
        return []

    def state_tensors(self) -> dict[str, Tensor]:
        """Return no tensors."""
        return {}


# keys of every record of a validation
_RECORD_KEYS = ("kind", "step", "tokens", "elapsed_s")


def check_figures(task: Task, figures: Any) -> None:
    """Check the result of `Task.evaluate`.

    Raises:
        UserError: it is not a table of numbers and texts by name, or lacks a required figure.
    """
    what = f"task {task.name!r}: evaluate"
    if not isinstance(figures, Mapping):
        raise UserError(f"{what} returns {figures!r}; wanted figures by name", "incomplete")
    for name in ("val_loss", task.metric.name):
        if name not in figures:
            raise UserError(
                f"{what} returns no {name!r} (found {', '.join(figures) or 'nothing'}); add it", "incomplete"
            )
        if not isinstance(figures[name], int | float) or isinstance(figures[name], bool):
            raise UserError(f"{what}: {name} is {figures[name]!r}; wanted a number, such as x.item()")
    for name, value in figures.items():
        if not isinstance(name, str) or name in _RECORD_KEYS:
            raise UserError(f"{what}: a figure has the name {name!r}; wanted another")
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise UserError(f"{what}: {name} is {value!r}; wanted a number (such as x.item()), a text or None")


def check_loss(task: Task, found: Any) -> StepLoss:
    """Return the result of `Task.loss` as a StepLoss.

    Raises:
        UserError: the loss is not a scalar tensor with a gradient, or a further sum is not a scalar tensor.
    """
    what = f"task {task.name!r}: loss"
    step_loss = found if isinstance(found, StepLoss) else StepLoss(found)
    loss_sum, sums = step_loss
    if not isinstance(loss_sum, Tensor) or loss_sum.dim():
        raise UserError(f"{what} is {_described(loss_sum)}; wanted a scalar tensor, the sum over the targets")
    if not loss_sum.requires_grad:
        raise UserError(f"{what} has no gradient; compute it from the model's outputs, without detach() or item()")
    if not isinstance(sums, Mapping):
        raise UserError(f"{what}: its further sums are {_described(sums)}; wanted tensors by name")
    for name, value in sums.items():
        if not isinstance(value, Tensor) or value.dim():
            raise UserError(f"{what}: its sum {name} is {_described(value)}; wanted a scalar tensor")
    return step_loss


def check_count(task: Task, method: str, count: Any) -> int:
    """Return the result of `Task.num_tokens` or `Task.num_targets`.

    Args:
        task: the task.
        method: name of the method, for the message.
        count: its result.

    Raises:
        UserError: it is not a whole number of at least 0.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UserError(f"task {task.name!r}: {method} returns {count!r}; wanted a whole number, 0 or more")
    return count


def _described(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor) else repr(value)
