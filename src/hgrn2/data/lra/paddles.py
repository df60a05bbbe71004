"""Paddles of Pathfinder images: short antialiased lines, and the space that each takes, for whole degrees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# directions of a paddle: whole degrees
NUM_DIRECTIONS = 360
# lobes of the Lanczos kernel
_LOBES = 3
# pixels of the finer grid that paddles and discs are drawn on, per pixel and side
_FINE = 2


@dataclass(frozen=True)
class Paddles:
    """Pictures of a paddle that starts in the centre of a square.

    Attributes:
        lines: [360, P, P] in [0, 1], the line, by direction in degrees.
        spaces: [360, P, P] in [0, 1], the line and its margin, which no other paddle may touch.
        reach: (P - 1) / 2, pixels from the centre to the border.
        length: pixels of a paddle.
        margin: pixels between paddles.
    """

    lines: Floats
    spaces: Floats
    reach: int
    length: int
    margin: int


@lru_cache(maxsize=8)
def make_paddles(length: int, thickness: float, margin: int) -> Paddles:
    """Draw the paddles of one kind.

    Args:
        length: pixels of a paddle.
        thickness: its thickness in pixels, a multiple of a half.
        margin: pixels between paddles.
    """
    reach = length + int(np.ceil(thickness)) + margin
    size, fine = 2 * reach + 1, 2 * reach * _FINE + 1
    angles = np.arange(NUM_DIRECTIONS) * (2 * np.pi / NUM_DIRECTIONS)
    ends = np.stack([np.sin(angles), np.cos(angles)], 1) * length * _FINE
    grid = np.stack(np.meshgrid(*[np.arange(fine) - reach * _FINE] * 2, indexing="ij"), -1).astype(float)
    along = np.clip(np.einsum("yxc,dc->dyx", grid, ends) / (ends**2).sum(1)[:, None, None], 0, 1)
    distance = np.linalg.norm(grid[None] - along[..., None] * ends[:, None, None], axis=-1)
    half = thickness * _FINE / 2
    resize = lanczos(size, fine)
    # a line of one fine pixel has one of them per column, or per row if it is steep
    thin = 0.5 * np.abs(np.stack([np.sin(angles), np.cos(angles)])).max(0)[:, None, None]
    lines = _resize(resize, distance <= (half if half > 0.5 else thin))
    spaces = _resize(resize, distance <= half + margin * _FINE)
    return Paddles(lines, spaces, reach, length, margin)


@lru_cache(maxsize=8)
def make_disc(radius: float) -> Floats:
    """Return a filled disc [P, P] in [0, 1], centred.

    Args:
        radius: in pixels.
    """
    reach = int(np.ceil(radius)) + 1
    fine = (2 * reach + 1) * _FINE
    places = (np.arange(fine) + 0.5) / _FINE - 0.5 - reach
    disc = places[:, None] ** 2 + places[None] ** 2 <= radius**2
    resize = lanczos(2 * reach + 1, fine)
    return _resize(resize, disc)


def _resize(resize: NDArray[Any], fine: NDArray[Any]) -> Floats:
    """Resize pictures [..., F, F] in [0, 1] along both axes, rounded to 8 bits after each, as image libraries do."""
    rows = np.rint(255 * np.clip(fine.astype(float) @ resize.T, 0, 1)) / 255
    return (np.rint(255 * np.clip(resize @ rows, 0, 1)) / 255).astype(np.float32)


def lanczos(size: int, fine: int) -> NDArray[Any]:
    """Return the matrix [size, fine] that resizes an axis by Lanczos interpolation with three lobes."""
    scale = fine / size
    centres = (np.arange(size) + 0.5) * scale
    x = (np.arange(fine)[None] + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(x) < _LOBES, np.sinc(x) * np.sinc(x / _LOBES), 0)
    return weights / weights.sum(1, keepdims=True)
