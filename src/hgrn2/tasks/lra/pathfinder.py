"""Pathfinder and Path-X: do two discs lie on one dashed curve?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar

import torch

from hgrn2.constraints import Ge, Le
from hgrn2.data.lra.pathfinder import STYLES
from hgrn2.data.lra.pathfinder_set import pathfinder_set, read_official_pathfinder
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.errors import UserError
from hgrn2.tasks.lra.base import LRAOptions, LRATask
from hgrn2.tasks.registry import register_task

_TRAIN_SEED, _TEST_SEED = 0, 1
# the official split of one folder of images: 80, 10 and 10 %
_TRAIN_SHARE, _TEST_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class PathfinderOptions(LRAOptions):
    """Options of Pathfinder; the defaults are the sizes of Long Range Arena's splits."""

    what = "task 'lra-pathfinder'"
    paths = ("data", "cache")

    size: Annotated[int, Ge(32), Le(256)] = 32
    """Pixels of a side: 32, 64, 128 or 256."""
    training_examples: Annotated[int, Ge(1), Le(10**7)] = 160_000
    """Images to draw for training."""
    test_examples: Annotated[int, Ge(1), Le(10**7)] = 20_000
    """Images to draw for validation."""
    data: str | None = None
    """Folder of official images (with metadata and imgs) to read instead of drawing them."""
    cache: str = ".hgrn2-pathfinder"
    """Folder that keeps drawn images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in STYLES:
            raise UserError(f"{self.what}: size is {self.size}; wanted {', '.join(map(str, STYLES))}")


@register_task
class PathfinderTask(LRATask):
    """Decide whether two discs lie on one dashed curve."""

    name = "lra-pathfinder"
    Options: ClassVar[Any] = PathfinderOptions
    vocab_size = 0

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Read or draw the images of a split."""
        is_train = split == "train"
        if options.data is not None:
            found = read_official_pathfinder(Path(options.data), options.size)
            train, test = int(_TRAIN_SHARE * len(found)), int((1 - _TEST_SHARE) * len(found))
            return found.rows(slice(train) if is_train else slice(test, None))
        num = options.training_examples if is_train else options.test_examples
        return pathfinder_set(options.size, num, _TRAIN_SEED if is_train else _TEST_SEED, Path(options.cache))

    @classmethod
    def show_samples(cls, options: Any, count: int, start: int, folder: Path) -> str:
        """Write a picture of held-out images, drawn without the rest of the set."""
        if options.data is not None:
            return super().show_samples(options, count, start, folder)
        with TemporaryDirectory() as cache:
            few = replace(options, test_examples=max(1, start + count), cache=cache)
            return super().show_samples(few, count, start, folder)

    @classmethod
    def seq_len(cls, options: Any) -> int:
        """Return the number of pixels of an image."""
        return options.size**2

    @classmethod
    def grid_width_of(cls, options: Any) -> int:
        """Return the number of pixels per row."""
        return options.size

    def prepared(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return values [B, T, 1]; mean and deviation of the grey values are about 0.08 and 0.2."""
        return ((inputs.float() / 255 - 0.08) / 0.2)[..., None]


@dataclass(frozen=True)
class PathXOptions(PathfinderOptions):
    """Options of Path-X: Pathfinder with 128 x 128 = 16,384 pixels."""

    what = "task 'lra-pathx'"

    size: Annotated[int, Ge(32), Le(256)] = 128
    """Pixels of a side."""


@register_task
class PathXTask(PathfinderTask):
    """Decide whether two discs lie on one dashed curve, in images of 16,384 pixels."""

    name = "lra-pathx"
    Options: ClassVar[Any] = PathXOptions
