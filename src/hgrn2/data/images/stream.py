"""Decode batches of images in threads, ahead of training: for sets that do not fit into memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from hgrn2.data.images.decode import pillow, resize_and_crop, to_pixels
from hgrn2.data.images.image_set import ImageSet, Pixels
from hgrn2.errors import UserError

# attempts to replace an unreadable image by a readable one
_MAX_ATTEMPTS = 100


class Decoder:
    """Decodes images of a set to one size, cropped at random or at the centre.

    Args:
        found: the set.
        size: height and width.
        channels: 1 for grey, 3 for RGB.
        min_scale: smallest area of a random crop (arXiv 1409.4842), as a share; 1 for a crop of the centre.
        enlarge: ratio of the size before a crop of the centre to `size`, such as 256 / 224 for ImageNet.

    Attributes:
        skipped: number of different images that could not be read and were replaced by the next one.
    """

    def __init__(
        self, found: ImageSet, size: tuple[int, int], channels: int, min_scale: float = 1.0, enlarge: float = 1.0
    ) -> None:
        self._set, self._size, self._channels = found, size, channels
        self._min_scale, self._enlarge = min_scale, enlarge
        self._bad: set[int] = set()

    @property
    def skipped(self) -> int:
        """Number of different images that could not be read."""
        return len(self._bad)

    def __call__(self, row: int, seed: tuple[int, ...]) -> tuple[Pixels, int]:
        """Return the pixels [C, H, W] and the label of an image, or of the next readable one.

        Args:
            row: index of the image.
            seed: seed of the random crop.

        Raises:
            UserError: a hundred images in a row cannot be read.
        """
        read = self._set.read
        for attempt in range(_MAX_ATTEMPTS):
            at = (row + attempt) % len(self._set)
            assert read is not None
            try:
                image = self._crop(read(at), seed)
            except UserError:
                self._bad.add(at)
                continue
            return to_pixels(image, self._channels), int(self._set.labels[at])
        raise UserError(
            f"{_MAX_ATTEMPTS} images from {self._set.names(row)} on cannot be read; check the files", "unreadable"
        )

    def _crop(self, image: Any, seed: tuple[int, ...]) -> Any:
        height, width = self._size
        if self._min_scale >= 1:
            larger = round(height * self._enlarge), round(width * self._enlarge)
            image = resize_and_crop(image, larger)
            left, top = (larger[1] - width) // 2, (larger[0] - height) // 2
            return image.crop((left, top, left + width, top + height))
        rng = np.random.default_rng(seed)
        area = image.width * image.height * rng.uniform(self._min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        crop_height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left = int(rng.integers(0, image.width - crop_width + 1))
        top = int(rng.integers(0, image.height - crop_height + 1))
        box = (left, top, left + crop_width, top + crop_height)
        # reducing_gap decimates large crops first, which is several times faster
        return image.resize((width, height), pillow().Resampling.BICUBIC, box=box, reducing_gap=2.0)


class Prefetcher:
    """Makes batches by number in threads, a few of them in advance.

    Args:
        make: returns the jobs of a batch; each is called in a thread.
        workers: threads.
        ahead: number of batches in advance.
    """

    def __init__(self, make: Callable[[int], list[Callable[[], Any]]], workers: int, ahead: int = 3) -> None:
        self._make, self._ahead = make, ahead
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._waiting: deque[tuple[int, list[Future[Any]]]] = deque()

    def take(self, number: int) -> list[Any]:
        """Return the results of a batch's jobs; start those of the next batches."""
        if not self._waiting or self._waiting[0][0] != number:
            for _, jobs in self._waiting:
                for job in jobs:
                    job.cancel()
            self._waiting.clear()
        while len(self._waiting) <= self._ahead:
            wanted = number + len(self._waiting)
            self._waiting.append((wanted, [self._pool.submit(job) for job in self._make(wanted)]))
        return [job.result() for job in self._waiting.popleft()[1]]
