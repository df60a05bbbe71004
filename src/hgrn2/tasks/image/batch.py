"""Batches of images, before augmentation."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images by row or by pixels, with the arguments of its augmentation.

    Attributes:
        labels: [B] int64, or [B, C] float32 probabilities if images are mixed.
        rows: [B] int64, rows of the images in memory; None if there are pixels.
        pixels: [B, C, H, W] uint8.
        affine, colours, erased, own_weight, cut: arguments of `hgrn2.data.images.augment`.
    """

    labels: Tensor
    rows: Tensor | None = None
    pixels: Tensor | None = None
    affine: Tensor | None = None
    colours: Tensor | None = None
    erased: Tensor | None = None
    own_weight: Tensor | None = None
    cut: Tensor | None = None

    def to(self, device: torch.device) -> ImageBatch:
        """Return the batch on a device; a copy from pinned memory is asynchronous."""
        return ImageBatch(**{name: x.to(device, non_blocking=True) for name, x in self._tensors().items()})

    def pin_memory(self) -> ImageBatch:
        """Return the batch in pinned memory."""
        return ImageBatch(**{name: x.pin_memory() for name, x in self._tensors().items()})

    def changes(self) -> dict[str, Tensor]:
        """Return the arguments of `hgrn2.data.images.augment`."""
        return {name: x for name, x in self._tensors().items() if name not in ("labels", "rows", "pixels")}

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in found.items() if x is not None}
