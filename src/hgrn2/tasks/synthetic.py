"""The task of every generator: batches from a seed and a position, the loss of the targets, and their accuracy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.tasks.base import Metric, ReportFigure, StepLoss, TaskBase, TaskContext, TaskReport
from hgrn2.tasks.device_examples import DeviceExamples, RowsBatch, shared_examples
from hgrn2.tasks.generators import GENERATORS, SyntheticOptions, generate
from hgrn2.tasks.generators.base import IGNORE, TRAINING, VALIDATION, Examples, block_size, draw_block
from hgrn2.tasks.generators.draws import Draws, Ints
from hgrn2.tasks.registry import TASKS, register_task

# stream of a seed that shuffles a fixed training set
_SHUFFLING = 2
# options that may change when a run is resumed
_ABOUT_EVALUATION = frozenset({"eval_lengths", "eval_at", "validation_examples"})
# tokens per batch of a validation on a GPU, where launches dominate the time of small batches
_GPU_TOKENS = 2**17
_ACCURACY = "share of targets that the model gives the highest logit"
_EXACT = "share of examples without a wrong target"


@dataclass(frozen=True)
class SyntheticBatch:
    """A batch of examples; its shapes depend on the options only.

    Attributes:
        input_ids: [B, T] int64.
        positions: [M] int64, flat positions of the targets in [B, T].
        targets: [M] int64.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor

    @classmethod
    def of(cls, examples: Examples) -> Self:
        """Return the batch of some examples, on the CPU."""
        positions = np.flatnonzero(examples.targets != IGNORE)
        found = examples.inputs, positions, examples.targets.reshape(-1)[positions]
        return cls(*(torch.from_numpy(np.ascontiguousarray(x)) for x in found))

    @property
    def num_tokens(self) -> int:
        """Number of inputs."""
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        """Number of targets."""
        return self.targets.numel()

    def to(self, device: torch.device) -> SyntheticBatch:
        """Return the batch on a device; a copy from pinned memory is asynchronous."""
        moved = (x.to(device, non_blocking=True) for x in (self.input_ids, self.positions, self.targets))
        return SyntheticBatch(*moved)

    def pin_memory(self) -> SyntheticBatch:
        """Return the batch in pinned memory."""
        return SyntheticBatch(self.input_ids.pin_memory(), self.positions.pin_memory(), self.targets.pin_memory())


class SyntheticTask(TaskBase):
    """Base of synthetic tasks; `register_synthetic_task` makes one of a generator.

    Args:
        options: options of the generator.
        context: provides batch_size, seed, device and model_config.

    Raises:
        UserError: the model has too small a vocabulary, or examples cannot be drawn.
    """

    name: ClassVar[str]
    Options: ClassVar[type[SyntheticOptions]]
    metric = Metric("val_accuracy", higher_is_better=True)
    splits_batches = True
    report = TaskReport(
        figures=(
            ReportFigure("val_accuracy", "accuracy", ".1%", _ACCURACY, ".2%"),
            ReportFigure("val_exact", "whole examples", ".1%", _EXACT, ".2%"),
        )
    )

    def __init__(self, options: SyntheticOptions, context: TaskContext) -> None:
        self._options, self._context = options, context
        config = context.model_config
        if config is not None and config.vocab_size < options.vocab_size:
            raise UserError(
                f"task {self.name!r} has a vocabulary of {options.vocab_size}, the model one of {config.vocab_size}; "
                "leave out vocab_size of the model, or lower that of the task",
                "mismatch",
            )
        self._train = _ExampleStream(options, context.seed)
        self._position = 0
        # by the ending of their figures
        held_out = {"": options} | {f"_{name}": changed for name, changed in options.evaluations().items()}
        self._held_out = {
            ending: _ExampleStream(changed, context.seed, VALIDATION) for ending, changed in held_out.items()
        }
        for examples in (self._train, *self._held_out.values()):
            # refuses now what cannot be drawn
            examples.take(0, 1)

    @classmethod
    def build(cls, options: SyntheticOptions, context: TaskContext) -> Self:
        """Make the task."""
        return cls(options, context)

    @classmethod
    def model_settings(cls, options: SyntheticOptions) -> dict[str, Any]:
        """Return the size of the vocabulary."""
        return {"vocab_size": options.vocab_size}

    def next_batch(self) -> SyntheticBatch | RowsBatch:
        """Return the next batch: rows of a fixed set on a GPU, otherwise examples on the CPU."""
        size, context = self._context.batch_size, self._context
        start = self._position + context.rank * size
        self._position += size * context.num_ranks
        is_on_gpu = self._context.device.type == "cuda"
        if is_on_gpu and self._options.training_examples:
            return self._train.rows(start, size, self._context.device)
        batch = SyntheticBatch.of(self._train.take(start, size))
        return batch.pin_memory() if is_on_gpu else batch

    def num_tokens(self, batch: SyntheticBatch | RowsBatch) -> int:
        """Return the number of inputs of the batch."""
        return batch.num_tokens

    def num_targets(self, batch: SyntheticBatch | RowsBatch) -> int:
        """Return the number of targets of the batch."""
        return batch.num_targets

    def loss(self, model: Any, batch: SyntheticBatch | RowsBatch) -> StepLoss:
        """Return the cross entropy summed over the targets, in nats, and the number of correct ones."""
        is_on_device = isinstance(batch, RowsBatch)
        batch = SyntheticBatch(*batch.gather()) if is_on_device else batch.to(self._context.device)
        loss_sum, is_correct = _score(model, batch)
        return StepLoss(loss_sum, {"accuracy": is_correct.sum()})

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Return loss, accuracy and share of whole examples on held-out examples, at every length that is asked for.

        Figures of other options end in their name, e.g. "val_accuracy_length_128".
        """
        found: dict[str, Any] = {}
        for ending, examples in self._held_out.items():
            figures = self._evaluate(model, examples)
            found |= {f"{name}{ending}": value for name, value in figures.items()}
        return found

    def _evaluate(self, model: Any, stream: _ExampleStream) -> dict[str, float]:
        num, device = self._options.validation_examples, self._context.device
        # longer examples come in smaller batches
        size = max(1, self._context.batch_size * self._options.length // stream.options.length)
        if device.type == "cuda":
            size = max(size, _GPU_TOKENS // stream.options.length)
        sums: list[tuple[Tensor, Tensor, Tensor]] = []
        targets = 0
        for at in range(0, num, size):
            count = min(size, num - at)
            batch = stream.rows(at, count, device, num) if device.type == "cuda" else None
            batch = SyntheticBatch.of(stream.take(at, count)) if batch is None else SyntheticBatch(*batch.gather())
            loss_sum, is_correct = _score(model, batch)
            row_of = batch.positions // stream.options.length
            wrong = torch.zeros(count, device=device).index_add_(0, row_of, (~is_correct).float())
            sums.append((loss_sum.double(), is_correct.sum().double(), (wrong == 0).sum().double()))
            targets += batch.targets.numel()
        # wait for a GPU once, at the end
        nats, correct, exact = (sum(torch.stack(found).tolist()) for found in zip(*sums, strict=True))
        return {"val_loss": nats / targets, "val_accuracy": correct / targets, "val_exact": exact / num}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of examples taken so far, and the options they follow from."""
        return {"examples": self._position, "options": self._training_options()}

    def _training_options(self) -> dict[str, Any]:
        """Return the options that training examples depend on, as JSON has them."""
        options = dataclasses.asdict(self._options)
        return {name: _as_json(value) for name, value in options.items() if name not in _ABOUT_EVALUATION}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the position."""
        del tensors
        position = state.get("examples")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise UserError(f"state of task {self.name!r}: examples is {position!r}; wanted 0 or more", "damaged")
        now, before = self._training_options(), state.get("options", {})
        if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
            pairs = ", ".join(f"{name} is {now[name]!r}, was {before[name]!r}" for name in changed)
            raise UserError(
                f"task {self.name!r}: {pairs}; a run keeps the examples it began with, so leave the option out or "
                "start another run",
                "mismatch",
            )
        self._position = position


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


T = TypeVar("T", bound=type[SyntheticOptions])


def register_synthetic_task(options: T) -> T:
    """Add the task of a generator, under the generator's name; a decorator above `register_generator`.

    Args:
        options: the options class of a generator.

    Raises:
        UserError: the class is not that of a generator, or a task has its name.
    """
    if options not in GENERATORS.values():
        raise UserError(
            f"{options!r}: not registered; put @register_generator(name) below this decorator", "incomplete"
        )
    title = f"{options.name.title().replace('_', '')}Task"
    register_task(type(title, (SyntheticTask,), {"name": options.name, "Options": options, "__doc__": options.__doc__}))
    return options


class _ExampleStream:
    """Examples by position: new ones, or in training epochs of a fixed set, each shuffled differently."""

    def __init__(self, options: SyntheticOptions, seed: int, stream: int = TRAINING) -> None:
        self.options, self._seed, self._stream = options, seed, stream
        # 0 unless the set is fixed
        self._num = options.training_examples if stream == TRAINING else 0
        self._block: tuple[int, Examples] | None = None
        self._set: Examples | None = None
        self._order: tuple[int, Ints] | None = None
        self._device_order: tuple[int, Tensor] | None = None
        self._shared: DeviceExamples | None = None

    def take(self, start: int, count: int) -> Examples:
        """Return the examples at start to start + count - 1."""
        parts, end = [], start + count
        size = self._num or block_size(self.options)
        while start < end:
            part, low = divmod(start, size)
            high = min(size, low + end - start)
            parts.append(self._take_epoch(part, low, high) if self._num else self._take_block(part, low, high))
            start += high - low
        return parts[0] if len(parts) == 1 else Examples(*map(np.concatenate, zip(*parts, strict=True)))

    def rows(self, start: int, count: int, device: torch.device, num: int = 0) -> RowsBatch:
        """Return the examples at start to start + count - 1 as rows of a set on a device.

        Args:
            start: position of the first.
            count: number of examples.
            device: device of the set.
            num: size of the set for a stream that has no fixed one.
        """
        size = self._num or num
        if self._shared is None:
            self._shared = shared_examples(self.options, size, self._seed, device, self._stream)
        examples = self._shared
        if not self._num:
            return RowsBatch(torch.arange(start, start + count, device=device), examples)
        parts, end = [], start + count
        while start < end:
            epoch, low = divmod(start, size)
            high = min(size, low + end - start)
            if self._device_order is None or self._device_order[0] != epoch:
                self._device_order = epoch, torch.from_numpy(self._shuffled(epoch)).to(device)
            parts.append(self._device_order[1][low:high])
            start += high - low
        return RowsBatch(parts[0] if len(parts) == 1 else torch.cat(parts), examples)

    def _take_block(self, block: int, low: int, high: int) -> Examples:
        # batches are often parts of a block
        if self._block is None or self._block[0] != block:
            self._block = block, draw_block(self.options, self._seed, block, self._stream)
        return Examples(*(x[low:high] for x in self._block[1]))

    def _take_epoch(self, epoch: int, low: int, high: int) -> Examples:
        if self._set is None:
            self._set = generate(self.options, self._num, self._seed)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        rows = self._order[1][low:high]
        return Examples(*(x[rows] for x in self._set))

    def _shuffled(self, epoch: int) -> Ints:
        """Return the order of an epoch."""
        return np.argsort(Draws(self._seed, epoch, _SHUFFLING, 1).words(self._num), kind="stable")


def _score(model: Any, batch: SyntheticBatch) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and for each target whether it has the highest logit."""
    x, _ = model.hidden_states(batch.input_ids, keep_state=False)
    # logits at the targets only: most positions of a recall task have none
    x = x.flatten(0, 1).index_select(0, batch.positions)
    logits = functional.linear(x, model.lm_head.weight)
    is_correct = logits.detach().argmax(-1) == batch.targets
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, batch.targets, reduction="sum"), is_correct


for _options in list(GENERATORS.values()):
    if _options.name not in TASKS:
        register_synthetic_task(_options)
