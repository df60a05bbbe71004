"""Labelled images, decoded in memory or read from files one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hgrn2.errors import UserError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        labels: [N] int64, index into classes.
        classes: names of the classes.
        images: [N, C, H, W] uint8, decoded; None if `read` decodes them.
        read: returns image i as a PIL image; None if `images` holds them.
        names: returns the name of image i, for messages and pictures.
        skipped: images that were left out, by reason.
        fingerprint: digest of the labels and the names or pixels.
    """

    labels: Labels
    classes: tuple[str, ...]
    images: Pixels | None = None
    read: Callable[[int], Any] | None = None
    names: Callable[[int], str] = str
    skipped: Mapping[str, int] = field(default_factory=dict)
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: npt.NDArray[np.int64]) -> ImageSet:
        """Return the images of some rows, in that order."""
        read, names = self.read, self.names
        return ImageSet(
            self.labels[rows], self.classes, None if self.images is None else self.images[rows],
            None if read is None else lambda i: read(int(rows[i])), lambda i: names(int(rows[i])), self.skipped,
            self.fingerprint,
        )  # fmt: skip


def check_set(found: ImageSet, where: Path | str) -> ImageSet:
    """Return a set if every class has an image and every label a class.

    Raises:
        UserError: there are no images, a label is out of range, or a class is empty.
    """
    if not len(found):
        raise UserError(f"{where}: no images{_described(found.skipped)}; name a folder with images", "not-found")
    check_labels(found.labels, len(found.classes), where)
    counts = np.bincount(found.labels, minlength=len(found.classes))
    if empty := [found.classes[i] for i in np.flatnonzero(counts == 0)]:
        raise UserError(
            f"{where}: no readable image of class {', '.join(empty[:5])}{_described(found.skipped)}; add some, or "
            "remove the class",
            "incomplete",
        )
    return found


def check_labels(labels: Labels, num_classes: int, where: Path | str) -> None:
    """Raise a UserError if a label is not in [0, num_classes)."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{where}: label {int(labels[first])} of image {first} is not in [0, {num_classes}) ({len(wrong)} such "
            "labels); check that images and labels belong together"
        )


def check_same_classes(train: ImageSet, validation: ImageSet, where: Path | str) -> None:
    """Raise a UserError if two parts of the data have different classes."""
    only = [set(train.classes) - set(validation.classes), set(validation.classes) - set(train.classes)]
    if any(only):
        told = [
            f"{', '.join(sorted(names)[:5])} {'only in training' if i == 0 else 'only in validation'}"
            for i, names in enumerate(only)
            if names
        ]
        raise UserError(f"{where}: the parts have different classes: {'; '.join(told)}; make them agree", "mismatch")


def hold_out(found: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a set into training and validation images, the same share of each class.

    Args:
        found: the whole set.
        share: share of validation images, at least one of each class that has two images.
        seed: of the choice.

    Raises:
        UserError: no class has two images.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    held = np.zeros(len(found), bool)
    for label in range(len(found.classes)):
        rows = rng.permutation(np.flatnonzero(found.labels == label))
        num = min(len(rows) - 1, max(1, round(share * len(rows)))) if len(rows) else 0
        held[rows[:num]] = True
    if not held.any():
        raise UserError(
            f"no validation images: each of the {len(found.classes)} classes has a single image, and none can be held "
            "out; add images, or name a folder of others with --validation",
            "incomplete",
        )
    return found.select(np.flatnonzero(~held)), found.select(np.flatnonzero(held))


def _described(skipped: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in skipped.items())})" if skipped else ""
