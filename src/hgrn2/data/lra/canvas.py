"""Unfinished images, many of which are drawn at a time by pasting small pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hgrn2.data.lra.paddles import Floats, Ints

Bools = NDArray[np.bool_]


class Canvas:
    """Unfinished images, each within a border that is cut off at the end.

    Args:
        num: N.
        size: S.
        border: pixels around an image.
    """

    def __init__(self, num: int, size: int, border: int) -> None:
        self.size, self.border, self.width = size, border, size + 2 * border
        self.image: Floats = np.zeros((num, self.width, self.width), np.float32)
        self.mask: Floats = np.zeros((num, self.width, self.width), np.float32)

    def copy_of(self, rows: Ints) -> Canvas:
        """Return a copy of some of the images."""
        found = Canvas(0, self.size, self.border)
        found.image, found.mask = self.image[rows], self.mask[rows]
        return found

    def keep(self, rows: Bools) -> None:
        """Keep some of the images, and drop the others."""
        # a copy costs more than a paddle
        if rows.all():
            return
        self.image, self.mask = self.image[rows], self.mask[rows]

    def is_inside(self, place: Ints) -> Bools:
        """Return whether places [..., 2] are pixels of the image."""
        return np.asarray(((place >= 0) & (place < self.size)).all(-1))

    def window(self, rows: Ints, place: Ints, reach: int) -> Ints:
        """Return flat indices [N, P, P] of squares around places [N, 2]."""
        span = np.arange(-reach, reach + 1)
        place = np.clip(place, -self.border + reach, self.size + self.border - reach - 1) + self.border
        y, x = place[:, 0, None] + span, place[:, 1, None] + span
        return (rows[:, None, None] * self.width + y[:, :, None]) * self.width + x[:, None, :]


def paste(target: Floats, window: Ints, stamps: Floats) -> None:
    """Write the maximum of stamps [N, P, P] and the present values."""
    flat = target.reshape(-1)
    flat[window] = np.maximum(flat[window], stamps)
