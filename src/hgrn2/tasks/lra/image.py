"""CIFAR-10 as a sequence of 1,024 pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from hgrn2.data.lra.images import read_cifar
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.models.classifier import ClassifierOptions
from hgrn2.tasks.lra.base import LRAOptions, LRATask, SequenceBatch
from hgrn2.tasks.registry import register_task

_SIDE = 32


@dataclass(frozen=True)
class ImageSequenceOptions(LRAOptions):
    """Options of images as sequences; the standard protocol is grey, in one dimension, without augmentation."""

    what = "task 'lra-image'"
    paths = ("data",)

    data: str = "data/cifar10"
    """Folder with the binary files of CIFAR-10, or train.npz and test.npz."""
    colours: Literal["grey", "rgb"] = "grey"
    """One grey value or three colours per pixel."""
    augment: Literal["none", "flip", "flip-shift"] = "none"
    """Mirror half of the training images; flip-shift also moves them by up to 4 pixels."""


@register_task
class ImageSequenceTask(LRATask):
    """Classify an image from its pixels, read row by row."""

    name = "lra-image"
    Options: ClassVar[Any] = ImageSequenceOptions
    vocab_size = 0
    num_classes = 10
    grid_width = _SIDE

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Read the images of a split."""
        return read_cifar(Path(options.data), split, options.colours == "grey")

    @classmethod
    def seq_len(cls, options: Any) -> int:
        """Return the number of pixels of an image."""
        del options
        return _SIDE * _SIDE

    @classmethod
    def read_channels(cls, options: Any) -> int:
        """Return the number of values per pixel."""
        return 3 if options.colours == "rgb" else 1

    @classmethod
    def classifier_options(cls, options: Any, num_layers: int) -> ClassifierOptions:
        """Return the settings of the model besides those of its layers."""
        found = super().classifier_options(options, num_layers)
        return replace(found, channels=cls.read_channels(options))

    def prepared(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return values with about zero mean and unit variance, [B, T, C]."""
        # mean and deviation of the grey values
        values = (inputs.float() / 255 - 0.48) / 0.24
        return values if self.read_channels(self._options) > 1 else values[..., None]

    def augmented(self, batch: SequenceBatch) -> SequenceBatch:
        """Return the batch with some images mirrored and moved; random numbers follow from the position."""
        if self._options.augment == "none":
            return batch
        device = batch.inputs.device
        generator = torch.Generator(device).manual_seed(self._context.seed * 65_537 + self._batches_taken)
        num = len(batch.labels)
        images = batch.inputs.view(num, _SIDE, _SIDE, -1)
        columns = torch.arange(_SIDE, device=device).expand(num, _SIDE)
        is_mirrored = torch.rand(num, device=device, generator=generator) < 0.5
        columns = torch.where(is_mirrored[:, None], _SIDE - 1 - columns, columns)
        rows = torch.arange(_SIDE, device=device).expand(num, _SIDE)
        if self._options.augment == "flip-shift":
            shift = torch.randint(-4, 5, (2, num, 1), device=device, generator=generator)
            rows, columns = rows + shift[0], columns + shift[1]
        inside = ((rows >= 0) & (rows < _SIDE))[:, :, None] & ((columns >= 0) & (columns < _SIDE))[:, None]
        own = torch.arange(num, device=device)[:, None, None]
        found = images[own, rows.clamp(0, _SIDE - 1)[:, :, None], columns.clamp(0, _SIDE - 1)[:, None]]
        found = found * inside[..., None]
        return replace(batch, inputs=found.view(batch.inputs.shape))
