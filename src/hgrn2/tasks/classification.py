"""Base of classification tasks: cross entropy with soft targets, top-1 and top-5 accuracy, counts of confusions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.constraints import Ge, Lt
from hgrn2.errors import UserError
from hgrn2.shapes import describe
from hgrn2.tasks.base import Metric, ReportFigure, StepLoss, TaskBase, TaskContext, TaskReport
from hgrn2.tasks.options import TaskOptions

# with more classes, the picture is illegible and a record takes many kilobytes
MAX_CONFUSION_CLASSES = 24
_WORST_CLASSES = 5
_TOP = 5


@dataclass(frozen=True)
class ClassificationOptions(TaskOptions):
    """Options of every classification task."""

    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability that the training targets spread evenly over all classes."""


class ClassificationTask(TaskBase):
    """Base of tasks whose targets are classes.

    A task defines name, Options, build, next_batch, validation_batches, logits, state_dict and load_state, and sets
    `class_names` in its constructor. Its batches have a tensor `labels`: [B] int64, or [B, C] probabilities in
    training (mixup, cutmix).

    Args:
        options: options of the task.
        context: provides batch_size, seed, device and model_config.
    """

    Options: ClassVar[type[ClassificationOptions]] = ClassificationOptions
    metric = Metric("val_accuracy", higher_is_better=True)
    report = TaskReport(
        model="A classifier",
        unit="nats per example",
        counted="examples",
        figures=(
            ReportFigure("val_accuracy", "accuracy", ".1%", "share of examples whose class has the highest logit",
                         ".2%"),
            ReportFigure("val_top5", "top-5 accuracy", ".1%", "share of examples whose class is among the top five",
                         ".2%"),
        ),
    )  # fmt: skip

    class_names: Sequence[str]
    """Names of the classes, in the order of their labels."""

    def __init__(self, options: Any, context: TaskContext) -> None:
        self._options, self._context = options, context

    def logits(self, model: Any, batch: Any) -> Tensor:
        """Return the logits [B, C] of a batch.

        Args:
            model: the model.
            batch: a batch of `next_batch` or `validation_batches`, on any device.
        """
        raise NotImplementedError

    def labels(self, batch: Any) -> Tensor:
        """Return the labels [B], or probabilities [B, C], of a batch on the model's device; called after `logits`."""
        return batch.labels.to(self._context.device, non_blocking=True)

    def validation_batches(self) -> Iterable[Any]:
        """Return the batches of a validation, in the same order every time."""
        raise NotImplementedError

    def num_targets(self, batch: Any) -> int:
        """Return the number of examples of the batch."""
        return len(batch.labels)

    def num_tokens(self, batch: Any) -> int:
        """Return the number of examples of the batch."""
        return len(batch.labels)

    def loss(self, model: Any, batch: Any) -> StepLoss:
        """Return the cross entropy summed over the examples, in nats, and the number of correct ones."""
        return classification_loss(self.logits(model, batch), self.labels(batch), self._options.label_smoothing)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Return loss, accuracies, the worst classes and the counts of confusions on held-out examples.

        The loss is without label smoothing.
        """
        counts = ClassCounts(len(self.class_names), self._context.device)
        for batch in self.validation_batches():
            counts.add(self.logits(model, batch), self.labels(batch))
        return counts.figures(self.class_names)


def classification_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> StepLoss:
    """Return the cross entropy in nats, summed over examples, with the number of correct examples as "accuracy".

    Args:
        logits: [B, C].
        targets: [B] int64 labels, or [B, C] probabilities, the largest of which marks the correct class.
        label_smoothing: probability spread evenly over all classes.

    Raises:
        UserError: the shapes do not fit.
    """
    wanted = logits.shape[:1] if targets.dim() == 1 else logits.shape
    if logits.dim() != 2 or targets.shape != wanted or targets.is_floating_point() != (targets.dim() == 2):
        raise UserError(
            f"targets is {describe(targets)} for logits {list(logits.shape)}; wanted labels [B] int64 or probabilities "
            "[B, C]"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.dim() == 2:
        targets = targets.to(logits.dtype)
    loss_sum = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    labels = targets.argmax(-1) if targets.dim() == 2 else targets
    return StepLoss(loss_sum, {"accuracy": (logits.detach().argmax(-1) == labels).sum()})


class ClassCounts:
    """Sums over held-out examples, kept on the device until the end.

    Args:
        num_classes: C.
        device: device of the logits.

    Attributes:
        confusion: [C, C] int64; row = class of the example, column = class with the highest logit.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self._num_classes = num_classes
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._top = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: [B, C].
            labels: [B] int64.
        """
        if logits.dim() != 2 or logits.shape[1] != self._num_classes:
            raise UserError(f"logits is {describe(logits)}; wanted [B, {self._num_classes}], one per class", "mismatch")
        if not len(labels):
            return
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._loss_sum += functional.cross_entropy(logits, labels, reduction="sum").double()
        places = labels * self._num_classes + logits.argmax(-1)
        self.confusion += torch.bincount(places, minlength=len(self.confusion))
        if self._num_classes > _TOP:
            self._top += (logits.topk(_TOP, -1).indices == labels[:, None]).sum()

    def figures(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return the figures of a validation, as `Task.evaluate` does.

        "val_top5" needs more than five classes, "val_confusion" (JSON) at most 24. "val_worst_classes" names the
        classes with the lowest accuracy, the lowest first.

        Args:
            class_names: name of each class.

        Raises:
            UserError: no example was counted.
        """
        confusion = self.confusion.view(self._num_classes, self._num_classes).cpu()
        total = int(confusion.sum())
        if not total:
            raise UserError("validation: found no examples; wanted at least one", "not-found")
        figures: dict[str, Any] = {
            "val_loss": self._loss_sum.item() / total,
            "val_accuracy": int(confusion.diagonal().sum()) / total,
            "val_examples": total,
        }
        if self._num_classes > _TOP:
            figures["val_top5"] = self._top.item() / total
        figures["val_worst_classes"] = worst_classes(confusion, class_names)
        if self._num_classes <= MAX_CONFUSION_CLASSES:
            figures["val_confusion"] = json.dumps({"classes": list(class_names), "counts": confusion.tolist()})
        return figures


def worst_classes(confusion: Tensor, class_names: Sequence[str]) -> str:
    """Return the five classes with the lowest accuracy as text, the lowest first, with their most frequent confusion.

    Args:
        confusion: [C, C] counts; row = class of the example.
        class_names: name of each class.
    """
    totals = confusion.sum(1)
    present = [index for index in range(len(class_names)) if totals[index] > 0]
    shares = {index: int(confusion[index, index]) / int(totals[index]) for index in present}
    found = []
    for index in sorted(present, key=lambda i: shares[i])[:_WORST_CLASSES]:
        others = confusion[index].clone()
        others[index] = 0
        text = f"{class_names[index]} {shares[index]:.1%}"
        if int(others.max()):
            text += f" (often taken for {class_names[int(others.argmax())]})"
        found.append(text)
    return ", ".join(found)
