"""Image classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from hgrn2.data.images import ImageSet, augment, decode_set, guess_channels, open_sets
from hgrn2.data.images.augment import Augmentation
from hgrn2.data.images.stream import Decoder, Prefetcher
from hgrn2.errors import UserError
from hgrn2.models.vision.config import VisionConfig
from hgrn2.models.vision.model import VisionModel
from hgrn2.models.vision.presets import preset
from hgrn2.models.vision.saving import save_model
from hgrn2.tasks.base import TaskContext, TaskReport
from hgrn2.tasks.classification import ClassCounts, ClassificationTask
from hgrn2.tasks.image.averages import RunningMean
from hgrn2.tasks.image.batch import ImageBatch
from hgrn2.tasks.image.options import ImageOptions
from hgrn2.tasks.registry import register_task

# most bytes of images that "auto" keeps in memory
_MEMORY_LIMIT = 4 * 2**30
# ratio of the size of a whole image to that of its crop, for streamed images
_ENLARGE = 256 / 224
# images from which mean and standard deviation are estimated
_SAMPLED = 10_000
_DEFAULT_PRESET = "hgrn2_cct_nano"
# streams of random numbers of a seed
_ORDER, _DRAWS = 0, 1
# mean and standard deviation of ImageNet's channels, for images that are not in memory
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# folder of the model in a run
MODEL_FOLDER = "model"
# options that may change when a run is resumed
_ABOUT_PLACE = ("data", "validation", "workers", "eval_batch_size", "storage")


class Predictions(NamedTuple):
    """Classes of the validation images, on the CPU.

    Attributes:
        true: [N] int64, true classes.
        found: [N] int64, predicted classes.
        confidence: [N] float32, probability of the predicted class.
    """

    true: Tensor
    found: Tensor
    confidence: Tensor


@register_task
class ImageTask(ClassificationTask):
    """Classify images of a folder.

    Images are decoded once and kept on the device of the model as uint8, where every batch is augmented; sets that do
    not fit are decoded batch by batch in threads.

    Args:
        options: options of the task.
        context: provides batch_size, seed, device and model_config.

    Raises:
        UserError: the data cannot be read, or does not fit the model.
    """

    name: ClassVar[str] = "image"
    Options: ClassVar[type[ImageOptions]] = ImageOptions
    report: ClassVar[TaskReport] = dataclasses.replace(
        ClassificationTask.report,
        model="An image classifier",
        counted="images",
        pictures=(
            ("misclassified", "Misclassified held-out images, the errors with the highest confidence first."),
            ("contribution", "Images, and the contribution of each patch to the logit of the predicted class."),
        ),
        opening='from hgrn2.models.vision import load_model\n\nmodel, about = load_model("{run}/model")',
    )

    def __init__(self, options: ImageOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        train, held_out = _open(options)
        config: VisionConfig = context.model_config
        self.class_names = train.classes
        if config.num_classes != len(train.classes):
            raise UserError(
                f"{options.data}: {len(train.classes)} classes; the model has num_classes = {config.num_classes}; "
                "leave num_classes out",
                "mismatch",
            )
        self._size: tuple[int, int] = config.img_size
        self._channels = config.in_chans
        if self._channels not in (1, 3):
            raise UserError(f"in_chans is {self._channels}; images have 1 or 3 channels", "unsupported")
        num_bytes = (len(train) + len(held_out)) * self._channels * self._size[0] * self._size[1]
        # idx and CIFAR files are in memory already
        is_decoded = train.images is not None or held_out.images is not None
        fits = options.storage == "memory" or (options.storage == "auto" and num_bytes <= _MEMORY_LIMIT)
        is_in_memory = is_decoded or fits
        if is_in_memory:
            train, held_out = (
                decode_set(part, self._size, self._channels, options.workers, options.data)
                for part in (train, held_out)
            )
        self._train, self._held_out = train, held_out
        self.skipped = {name: sum(x) for name, x in _merged(train.skipped, held_out.skipped).items()}
        self._pixels = self._held_out_pixels = None
        mean, std = _IMAGENET
        if self._channels == 1:
            mean, std = [sum(mean) / 3], [sum(std) / 3]
        if is_in_memory:
            assert train.images is not None
            assert held_out.images is not None
            mean, std = _statistics(train.images)
            self._pixels = torch.from_numpy(train.images).to(context.device)
            self._held_out_pixels = torch.from_numpy(held_out.images).to(context.device)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=context.device)
        self._std = torch.tensor(std, dtype=torch.float32, device=context.device)
        # a streamed image is cropped while it is decoded
        scale = options.min_scale
        self._augmentation = options.augmentation if is_in_memory else _without_crop(options.augmentation)
        self._decoder = Decoder(train, self._size, self._channels, scale)
        self._prefetcher = Prefetcher(self._jobs, options.workers)
        self._position = 0
        self._order: tuple[int, Any] | None = None
        self._predictions: Predictions | None = None
        self._running_mean = RunningMean(options.ema_decay) if options.ema_decay else None
        # training passes since the task was built, which happens between two steps
        self._num_passes = 0

    @classmethod
    def build(cls, options: ImageOptions, context: TaskContext) -> Self:
        """Make the task."""
        return cls(options, context)

    @classmethod
    def model_settings(cls, options: ImageOptions) -> dict[str, Any]:
        """Return the classes, the channels and, if all images have one size, the size; reads the data."""
        train, _ = _open(options)
        found: dict[str, Any] = {"num_classes": len(train.classes), "in_chans": guess_channels(train)}
        if train.images is not None:
            found["img_size"] = list(train.images.shape[2:])
        return found

    @classmethod
    def make_model_config(cls, model: str | None, settings: Mapping[str, Any]) -> VisionConfig:
        """Return the configuration of an image preset with these settings; None means `hgrn2_cct_nano`."""
        return preset(_DEFAULT_PRESET if model is None else model, **settings)

    @classmethod
    def read_model_config(cls, settings: Mapping[str, Any]) -> VisionConfig:
        """Return the configuration of a saved run."""
        return VisionConfig.from_dict(settings)

    @classmethod
    def build_model(cls, options: ImageOptions, config: Any) -> nn.Module:
        """Make an image model."""
        del options
        return VisionModel(config)

    def next_batch(self) -> ImageBatch:
        """Return the next batch, on the CPU and without augmentation, which `logits` applies on the device."""
        number, size = divmod(self._position, self._context.batch_size)[0], self._context.batch_size
        rows = self._rows(number)
        rng = np.random.default_rng((self._context.seed, _DRAWS, number))
        draws = self._current_augmentation(number).draw(rng, size, self._size)
        pixels, labels = None, torch.from_numpy(self._train.labels[rows])
        if self._pixels is None:
            decoded = self._prefetcher.take(number)
            pixels = torch.from_numpy(np.stack([x for x, _ in decoded]))
            labels = torch.tensor([label for _, label in decoded])
        if (own := draws.pop("own_share", None)) is not None:
            soft = nn.functional.one_hot(labels, len(self.class_names)).float() * own[:, None]
            labels = soft + nn.functional.one_hot(labels.flip(0), len(self.class_names)) * (1 - own[:, None])
        self._position += size
        batch = ImageBatch(labels, None if pixels is not None else torch.from_numpy(rows), pixels, **draws)
        return batch.pin_memory() if self._context.device.type == "cuda" else batch

    def _current_augmentation(self, number: int) -> Augmentation:
        options, augmentation = self._options, self._augmentation
        if options.plain_share and options.epochs is not None:
            done = number * self._context.batch_size / len(self._train)
            if done >= options.epochs * (1 - options.plain_share):
                return dataclasses.replace(augmentation, strength=0.0, mixup=0.0, cutmix=0.0, erase=0.0)
        return augmentation

    def _rows(self, number: int) -> Any:
        """Return the rows of a batch, from epochs of all images in different orders."""
        size, num = self._context.batch_size, len(self._train)
        parts, start, end = [], number * size, (number + 1) * size
        while start < end:
            epoch, low = divmod(start, num)
            high = min(num, low + end - start)
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng((self._context.seed, _ORDER, epoch))
                self._order = epoch, rng.permutation(num)
            parts.append(self._order[1][low:high])
            start += high - low
        return np.concatenate(parts)

    def _jobs(self, number: int) -> list[Callable[[], Any]]:
        """Return the functions that decode the images of a batch."""
        return [
            partial(self._decoder, int(row), (self._context.seed, number, i))
            for i, row in enumerate(self._rows(number))
        ]

    def logits(self, model: Any, batch: ImageBatch) -> Tensor:
        """Augment a batch with its arguments, and return the logits [B, C]."""
        training = model.training
        if training and self._running_mean is not None:
            # once a step: all batches of a step see the same weights
            if self._num_passes % self._context.grad_accumulation == 0:
                self._running_mean.update(model)
            self._num_passes += 1
        batch = batch.to(self._context.device)
        pixels = batch.pixels
        if pixels is None:
            stored = self._pixels if training else self._held_out_pixels
            assert stored is not None
            assert batch.rows is not None
            pixels = stored.index_select(0, batch.rows)
        x = augment(pixels, self._mean, self._std, **batch.changes())
        return self._apply(model, x)

    def _apply(self, model: Any, x: Tensor) -> Tensor:
        """Run the model, in evaluation with the mean of its weights."""
        if model.training or self._running_mean is None or not self._running_mean.tensors:
            return model(x)
        return torch.func.functional_call(model, self._running_mean.tensors, (x,))

    def validation_batches(self) -> Iterator[ImageBatch]:
        """Return all validation images, in order."""
        size, num = self._options.eval_batch_size, len(self._held_out)
        if self._held_out_pixels is not None:
            for at in range(0, num, size):
                rows = torch.arange(at, min(num, at + size))
                yield ImageBatch(torch.from_numpy(self._held_out.labels[at : at + size]), rows)
            return
        decoder = Decoder(self._held_out, self._size, self._channels, enlarge=_ENLARGE)
        num_batches = -(-num // size)

        def jobs(number: int) -> list[Callable[[], Any]]:
            return [partial(decoder, row, (0,)) for row in range(number * size, min(num, (number + 1) * size))]

        prefetcher = Prefetcher(jobs, self._options.workers)
        for number in range(num_batches):
            decoded = prefetcher.take(number)
            yield ImageBatch(
                torch.tensor([y for _, y in decoded]), None, torch.from_numpy(np.stack([x for x, _ in decoded]))
            )

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Return the figures of `ClassificationTask.evaluate`, and the number of images that could not be read."""
        counts = ClassCounts(len(self.class_names), self._context.device)
        true, found, confidence = [], [], []
        for batch in self.validation_batches():
            logits, labels = self.logits(model, batch), self.labels(batch)
            counts.add(logits, labels)
            top = logits.float().softmax(1).max(1)
            true.append(labels)
            found.append(top.indices)
            confidence.append(top.values)
        # for the pictures at the end of a run, which follows a validation
        self._predictions = Predictions(*(torch.cat(x).cpu() for x in (true, found, confidence)))
        skipped = sum(self.skipped.values()) + self._decoder.skipped
        return counts.figures(self.class_names) | ({"skipped_images": skipped} if skipped else {})

    def draw(self, model: Any, folder: Path) -> list[Path]:
        """Save the model for use without the run, and draw pictures of its errors; return the pictures.

        Args:
            model: the model, in evaluation mode.
            folder: the run folder.
        """
        from hgrn2.tasks.image.pictures import draw_pictures

        mean, std = self._mean.tolist(), self._std.tolist()
        tensors = model.state_dict()
        if self._running_mean is not None:
            tensors = tensors | {name: x for name, x in self._running_mean.tensors.items() if name in tensors}
        about = {"classes": list(self.class_names), "mean": mean, "std": std}
        save_model(folder / MODEL_FOLDER, model.config, tensors, about)
        if self._predictions is None:
            self.evaluate(model)
        assert self._predictions is not None
        return draw_pictures(self, model, self._predictions, folder / "plots")

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return validation images, as pixels [B, C, H, W] uint8 and as inputs of the model.

        Args:
            rows: [B] int64.
        """
        if self._held_out_pixels is not None:
            pixels = self._held_out_pixels[rows.to(self._context.device)]
        else:
            decoder = Decoder(self._held_out, self._size, self._channels, enlarge=_ENLARGE)
            found = np.stack([decoder(int(row), (0,))[0] for row in rows])
            pixels = torch.from_numpy(found).to(self._context.device)
        return pixels, augment(pixels, self._mean, self._std)

    def averaged(self, model: Any) -> Any:
        """Return the model as it is validated: a copy with the mean of its weights, if there is one."""
        if self._running_mean is None or not self._running_mean.tensors:
            return model
        copy = VisionModel(model.config).to(self._context.device).eval()
        copy.load_state_dict({name: x for name, x in self._running_mean.tensors.items() if name in copy.state_dict()})
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Return the number of images taken so far, the digest of the data, and the options they follow from."""
        options = {k: v for k, v in dataclasses.asdict(self._options).items() if k not in _ABOUT_PLACE}
        return {"examples": self._position, "fingerprint": self._train.fingerprint, "options": options}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the running mean of the weights."""
        return {} if self._running_mean is None else self._running_mean.state()

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the position and the running mean.

        Raises:
            UserError: the images are not those of the run, or an option has changed.
        """
        position = state.get("examples")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise UserError(f"state of task 'image': examples is {position!r}; wanted 0 or more", "damaged")
        if state.get("fingerprint") != self._train.fingerprint:
            raise UserError(
                f"{self._options.data}: its images are not those that the run was started with; name the folder that "
                "has them with --data",
                "mismatch",
            )
        now, before = self.state_dict()["options"], state.get("options", {})
        if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
            raise UserError(
                f"task 'image': {', '.join(changed)} differs from that of the run; leave it out or start another run",
                "mismatch",
            )
        self._position = position
        if self._running_mean is not None:
            device = self._context.device
            moved = {name: x.to(device) for name, x in tensors.items()}
            self._running_mean = RunningMean(self._options.ema_decay, moved)


def _open(options: ImageOptions) -> tuple[ImageSet, ImageSet]:
    if not options.data:
        raise UserError("task 'image': no images; name their folder with --data", "incomplete")
    # one split for all seeds, so that runs can be compared
    return open_sets(options.data, options.validation, options.validation_share, 0)


def _merged(*counts: Mapping[str, int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in counts:
        for name, count in one.items():
            found.setdefault(name, []).append(count)
    return found


def _without_crop(augmentation: Augmentation) -> Augmentation:
    return dataclasses.replace(augmentation, min_scale=1.0)


def _statistics(images: Any) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of values in [0, 1], over images spread over the set."""
    chosen = images[:: max(1, len(images) // _SAMPLED)].astype(np.float32) / 255
    std = np.maximum(chosen.std((0, 2, 3)), 1e-3)
    return chosen.mean((0, 2, 3)).tolist(), std.tolist()
