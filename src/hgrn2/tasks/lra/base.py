"""Base of the tasks of Long Range Arena: sequences on the device, batches of similar lengths, accuracy by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.constraints import Ge, Gt, Le, Lt
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.errors import UserError, visible
from hgrn2.models import HGRN2Config
from hgrn2.models.classifier import ClassifierOptions, SequenceClassifier, mask_of
from hgrn2.nn.mixers import read_directions
from hgrn2.nn.mixers.directions import GRID_DIRECTIONS
from hgrn2.tasks.base import StepLoss, TaskContext
from hgrn2.tasks.classification import ClassCounts, ClassificationOptions, ClassificationTask
from hgrn2.tasks.lra.device_set import NUM_WIDTHS, DeviceSet, SequenceBatch
from hgrn2.tasks.lra.pretrained import load_pretrained

# most bytes of a sample that are shown
_SHOWN_BYTES = 300
# batches whose examples are sorted by length together
_POOL = 32


@dataclass(frozen=True)
class LRAOptions(ClassificationOptions):
    """Options of every task of Long Range Arena."""

    directions: str = "bidirectional"
    """Direction of each layer, repeated: causal, reverse, bidirectional, alternating, or 2d forms for images."""
    pooling: Literal["mean", "last", "first"] = "mean"
    """Hidden states that the head reads; padding is left out."""
    positions: bool = False
    """Learned embeddings of positions."""
    batch_norm: bool = False
    """BatchNorm in the blocks; only for tasks without padding."""
    head_hidden_size: Annotated[int, Ge(0)] = 0
    """Width of a hidden layer of the head; 0: a linear head."""
    validation_examples: Annotated[int, Ge(0)] = 0
    """Held-out examples of a validation; 0: all."""
    objective: Literal["classes", "masked"] = "classes"
    """Predict classes, or, for pretraining on the inputs, the values of masked tokens (arXiv 2310.02980)."""
    masked_share: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that objective masked hides."""
    start: str | None = None
    """A run of this task with objective masked, whose weights the run starts with."""
    hold_out: Annotated[int, Ge(0), Le(10**7)] = 0
    """Training examples to validate on instead of the test examples."""


class LRATask(ClassificationTask):
    """Base of the tasks of Long Range Arena.

    A task defines name, Options, vocab_size and `read`, and sets further class attributes.

    Args:
        options: options of the task.
        context: provides batch_size, seed, device and model_config.

    Raises:
        UserError: data are missing or damaged, or there are fewer training examples than a batch has.
    """

    Options: ClassVar[type[LRAOptions]] = LRAOptions
    name: ClassVar[str]
    vocab_size: ClassVar[int] = 256
    """Ids of the embedding; 0 for tasks whose inputs are values."""
    num_classes: ClassVar[int] = 2
    channels: ClassVar[int] = 1
    num_sequences: ClassVar[int] = 1
    grid_width: ClassVar[int] = 0

    def __init__(self, options: Any, context: TaskContext) -> None:
        super().__init__(options, context)
        if options.objective == "masked" and (self.num_sequences > 1 or self.read_channels(options) > 1):
            raise UserError(f"task {self.name!r}: objective masked needs one id or grey value per token", "unsupported")
        train, held_out = self.read(options, "train"), None
        if options.hold_out:
            if options.hold_out >= len(train):
                raise UserError(
                    f"task {self.name!r}: hold_out is {options.hold_out} of {len(train)} training examples; lower it",
                    "contradiction",
                )
            order = np.random.Generator(np.random.Philox(0)).permutation(len(train))
            held_out, train = train.rows(order[: options.hold_out]), train.rows(order[options.hold_out :])
        if len(train) < context.batch_size:
            raise UserError(
                f"task {self.name!r}: batch_size is {context.batch_size} and there are {len(train)} training "
                "examples; lower it",
                "contradiction",
            )
        held_out = self.read(options, "test") if held_out is None else held_out
        if options.validation_examples:
            # files may be sorted by class
            order = np.random.Generator(np.random.Philox(0)).permutation(len(held_out))
            held_out = held_out.rows(order[: options.validation_examples])
        self.class_names = train.class_names
        self.notes = {"training": train.notes, "validation": held_out.notes}
        self._train = DeviceSet.of(train, context.device)
        further = self.further_sets(options)
        self._held_out = {name: DeviceSet.of(x, context.device) for name, x in ({"": held_out} | further).items()}
        self._batches_taken = 0
        self._epoch: tuple[int, Tensor] | None = None

    @classmethod
    def build(cls, options: Any, context: TaskContext) -> Self:
        """Make the task."""
        return cls(options, context)

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Return the examples of a split, "train" or "test".

        Raises:
            UserError: data are missing or damaged.
        """
        raise NotImplementedError

    def further_sets(self, options: Any) -> dict[str, LabelledSequences]:
        """Return further held-out sets, such as longer sequences, by the suffix of their figures."""
        del options
        return {}

    @classmethod
    def seq_len(cls, options: Any) -> int:
        """Return the longest sequence, T."""
        return options.max_length

    @classmethod
    def model_settings(cls, options: Any) -> dict[str, Any]:
        """Return the size of the embedding."""
        del options
        # values have no embedding, and a configuration no vocabulary of 0
        return {"vocab_size": cls.vocab_size or 1}

    @classmethod
    def classifier_options(cls, options: Any, num_layers: int) -> ClassifierOptions:
        """Return the settings of the model besides those of its layers.

        Args:
            options: options of the task.
            num_layers: layers of the model.
        """
        directions = read_directions(options.directions, num_layers)
        is_grid = any(name in GRID_DIRECTIONS for name in directions)
        if is_grid and not cls.grid_width_of(options):
            raise UserError(f"task {cls.name!r}: directions {options.directions!r} need images", "contradiction")
        return ClassifierOptions(
            num_classes=cls.num_classes,
            input="tokens" if cls.vocab_size else "values",
            channels=cls.channels,
            directions=directions,
            pooling=options.pooling,
            positions=cls.seq_len(options) if options.positions else 0,
            batch_norm=options.batch_norm,
            num_sequences=cls.num_sequences,
            head_hidden_size=options.head_hidden_size,
            grid_width=cls.grid_width_of(options) if is_grid else 0,
            num_masked_classes=(cls.vocab_size or 256) if options.objective == "masked" else 0,
        )

    @classmethod
    def grid_width_of(cls, options: Any) -> int:
        """Return the number of pixels per row, or 0 for text."""
        del options
        return cls.grid_width

    @classmethod
    def build_model(cls, options: Any, config: HGRN2Config) -> nn.Module:
        """Make a classifier, with the weights of a run on masked tokens if the options name one."""
        model = SequenceClassifier(config, cls.classifier_options(options, config.num_hidden_layers))
        if options.start is not None and not model.head.weight.is_meta:
            load_pretrained(model, Path(options.start))
        return model

    @classmethod
    def show_samples(cls, options: Any, count: int, start: int, folder: Path) -> str:
        """Return held-out examples as text, or write a picture of them and return its path and their classes.

        Args:
            options: options of the task.
            count: number of examples.
            start: index of the first.
            folder: folder of the picture.
        """
        found = cls.read(options, "test")
        if start >= len(found):
            raise UserError(f"--start is {start}, and there are {len(found)} held-out examples; lower it")
        found = found.rows(slice(start, start + count))
        shown = cls.sample_picture(options, found)
        if shown is not None:
            from matplotlib.image import imsave

            path = folder / f"{cls.name}.png"
            imsave(path, shown, cmap="gray", vmin=0, vmax=255)
            names = ", ".join(found.class_names[label] for label in found.labels)
            return f"{path}: from left to right and from top to bottom: {names}"
        lines = []
        for row, label in enumerate(found.labels):
            parts = found.inputs[row].reshape(cls.num_sequences, -1)
            lengths = [parts.shape[1]] if found.lengths is None else found.lengths[row].reshape(-1)
            texts = [cls.sample_text(part[:length]) for part, length in zip(parts, lengths, strict=True)]
            lines.append(f"{found.class_names[label]}: " + " | ".join(texts))
        return "\n\n".join(lines)

    @classmethod
    def sample_text(cls, tokens: Any) -> str:
        """Return the start of a sequence as readable text."""
        text = visible(bytes(tokens[:_SHOWN_BYTES]).decode("utf-8", "replace"))
        return text + (f" ... ({len(tokens):,} bytes)" if len(tokens) > _SHOWN_BYTES else "")

    @classmethod
    def sample_picture(cls, options: Any, found: LabelledSequences) -> Any:
        """Return images side by side, [H, W] or [H, W, 3] uint8; None for text."""
        width = cls.grid_width_of(options)
        if not width:
            return None
        images = found.inputs.reshape(len(found), -1, width, *found.inputs.shape[2:])
        # enlarged, with a grey line between images
        scale = max(1, 128 // width)
        images = images.repeat(scale, 1).repeat(scale, 2)
        columns = min(len(images), 8)
        rows = -(-len(images) // columns)
        high, wide = images.shape[1] + 4, images.shape[2] + 4
        sheet = np.full((rows * high, columns * wide, *images.shape[3:]), 90, np.uint8)
        for index, image in enumerate(images):
            top, left = divmod(index, columns)
            sheet[top * high + 2 : (top + 1) * high - 2, left * wide + 2 : (left + 1) * wide - 2] = image
        return sheet

    def next_batch(self) -> SequenceBatch:
        """Return the next batch of a shuffled epoch; examples of similar length come together."""
        size = self._context.batch_size
        per_epoch = len(self._train) // size
        epoch, place = divmod(self._batches_taken, per_epoch)
        self._batches_taken += 1
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch, per_epoch)
        batch = self.augmented(self._train.take(self._epoch[1][place]))
        return self._masked(batch, self._batches_taken) if self._options.objective == "masked" else batch

    @classmethod
    def read_channels(cls, options: Any) -> int:
        """Return the number of values per token."""
        del options
        return cls.channels

    def _masked(self, batch: SequenceBatch, seed: int) -> SequenceBatch:
        """Return the batch with a random mask that depends on the seed."""
        device = batch.inputs.device
        generator = torch.Generator(device).manual_seed(self._context.seed * 65_537 + seed)
        is_masked = torch.rand(batch.inputs.shape, device=device, generator=generator) < self._options.masked_share
        if batch.lengths is not None:
            is_masked &= mask_of(batch.lengths, batch.inputs.shape[1])
        return replace(batch, is_masked=is_masked)

    def _masked_loss(self, model: Any, batch: SequenceBatch) -> StepLoss:
        """Return the mean loss of the masked tokens times the number of examples, as targets are counted by example."""
        assert batch.is_masked is not None
        logits = model.masked_logits(self.prepared(batch.inputs), batch.lengths, batch.is_masked).float()
        labels = batch.inputs.long()
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        share = batch.is_masked.flatten() * (len(labels) / batch.is_masked.sum().clamp(min=1))
        is_correct = (logits.argmax(-1) == labels).flatten()
        return StepLoss((losses * share).sum(), {"accuracy": (is_correct * share).sum()})

    def loss(self, model: Any, batch: SequenceBatch) -> StepLoss:
        """Return the loss of the objective summed over the examples, and the number (or share) of correct ones."""
        return super().loss(model, batch) if batch.is_masked is None else self._masked_loss(model, batch)

    def augmented(self, batch: SequenceBatch) -> SequenceBatch:
        """Return a training batch; tasks with augmentation change it."""
        return batch

    def _order(self, epoch: int, per_epoch: int) -> Tensor:
        """Return the rows [batches, B] of an epoch."""
        size, generator = self._context.batch_size, torch.Generator().manual_seed(self._context.seed * 65_537 + epoch)
        order = torch.randperm(len(self._train), generator=generator)[: per_epoch * size]
        if self._train.longest is None:
            return order.view(per_epoch, size)
        pools = [part[self._train.longest[part].argsort(stable=True)] for part in order.split(_POOL * size)]
        batches = torch.cat(pools).view(per_epoch, size)
        return batches[torch.randperm(per_epoch, generator=generator)]

    def logits(self, model: Any, batch: SequenceBatch) -> Tensor:
        """Return the logits [B, C]."""
        return model(self.prepared(batch.inputs), batch.lengths)

    def prepared(self, inputs: Tensor) -> Tensor:
        """Return the input of the model: ids unchanged, values scaled to [-1, 1]."""
        if self.vocab_size:
            return inputs
        values = inputs.float() / 127.5 - 1
        return values if self.channels > 1 else values[..., None]

    def validation_batches(self) -> Iterator[SequenceBatch]:
        """Return the held-out batches, from short to long."""
        yield from self._batches_of(self._held_out[""])

    def _batches_of(self, found: DeviceSet) -> Iterator[SequenceBatch]:
        order = torch.arange(len(found)) if found.longest is None else found.longest.argsort(stable=True)
        for rows in order.split(self._context.batch_size):
            yield found.take(rows)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Return the figures of `ClassificationTask`, and accuracies by length and on further sets.

        "val_accuracy_length_1000" is the accuracy of sequences of at most 1,000 tokens that are longer than the bucket
        below.
        """
        if self._options.objective == "masked":
            return self._evaluate_masked(model)
        figures: dict[str, Any] = {}
        for suffix, found in self._held_out.items():
            counts = ClassCounts(len(self.class_names), self._context.device)
            correct, lengths = [], []
            for batch in self._batches_of(found):
                logits = self.logits(model, batch)
                counts.add(logits, batch.labels)
                if batch.lengths is not None:
                    correct.append(logits.argmax(-1) == batch.labels)
                    lengths.append(batch.lengths.reshape(len(batch.labels), -1).amax(1))
            own = counts.figures(self.class_names)
            if suffix:
                figures |= {f"val_loss{suffix}": own["val_loss"], f"val_accuracy{suffix}": own["val_accuracy"]}
                continue
            figures |= own
            if correct:
                figures |= _by_length(torch.cat(correct), torch.cat(lengths), found.inputs.shape[-1])
        return figures

    def _evaluate_masked(self, model: Any) -> dict[str, Any]:
        sums, num = torch.zeros(2, dtype=torch.float64, device=self._context.device), 0
        for index, batch in enumerate(self.validation_batches()):
            loss_sum, further = self._masked_loss(model, self._masked(batch, index))
            sums += torch.stack([loss_sum, further["accuracy"]]).double()
            num += len(batch.labels)
        loss, accuracy = (sums / num).tolist()
        return {"val_loss": loss, "val_accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches taken."""
        return {"batches": self._batches_taken}

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the position."""
        del tensors
        position = state.get("batches")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise UserError(f"state of task {self.name!r}: batches is {position!r}; wanted 0 or more", "damaged")
        self._batches_taken = position


def _by_length(correct: Tensor, lengths: Tensor, longest: int) -> dict[str, float]:
    """Return the accuracy of each quarter of the lengths that has examples."""
    found = {}
    part = -(-longest // NUM_WIDTHS)
    for low in range(0, longest, part):
        inside = (lengths > low) & (lengths <= low + part)
        if total := int(inside.sum()):
            found[f"val_accuracy_length_{min(low + part, longest)}"] = int((correct & inside).sum()) / total
    return found
