"""Augmentation in batches: random numbers are drawn on the CPU, pixels change on the device of the images.

The draws of a batch follow from a seed and the batch's position, so that a resumed run sees the same images, and a
captured training step needs no random generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.constraints import Ge, Gt, Le, check_fields

# weights of red, green and blue in grey (ITU-R 601)
_LUMA = (0.299, 0.587, 0.114)
# changes at strength 1, chosen here: shear, shift as a share of the size, rotation in radians, colour factor
_SHEAR, _SHIFT, _TURN, _FACTOR = 0.6, 0.4, math.pi / 3, 0.9
# share of the images to which each kind of random operation is applied
_OPERATION_SHARE = 0.75
_COLOURS = ("brightness", "saturation", "contrast", "sharpness", "levels", "threshold")
_NEUTRAL = (1.0, 1.0, 1.0, 1.0, 256.0, 2.0)
# area as a share of the image, and logarithm of height over width, of an erased rectangle
_ERASED_SHARE, _ERASED_LOG_RATIO = (0.02, 0.33), (math.log(0.3), -math.log(0.3))
# logarithm of the largest ratio of width to height of a random crop
_CROP_LOG_RATIO = math.log(4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """Settings of augmentation; all off by default.

    Attributes:
        crop_padding: random shift of up to this many pixels along each axis; pixels beyond the border are reflected.
        flip: whether images are mirrored left to right at random.
        min_scale: smallest area of a random crop as a share of the image; 1 for none (ImageNet: 0.08).
        strength: of random operations, in [0, 1]: one of shear, shift, rotation, and one of brightness, saturation,
            contrast, sharpness, posterize, solarize, as in RandAugment (arXiv 1909.13719); 0 for none.
        erase: probability of erasing a rectangle (arXiv 1708.04896).
        mixup: parameter of the Beta distribution of mixing weights (arXiv 1710.09412); 0 for none.
        cutmix: parameter of the Beta distribution for pasted rectangles of another image (arXiv 1905.04899); 0 for
            none.
        mix_share: share of the images that are mixed, by either of the two.
    """

    crop_padding: Annotated[int, Ge(0)] = 0
    flip: bool = False
    min_scale: Annotated[float, Gt(0), Le(1)] = 1.0
    strength: Annotated[float, Ge(0), Le(1)] = 0.0
    erase: Annotated[float, Ge(0), Le(1)] = 0.0
    mixup: Annotated[float, Ge(0)] = 0.0
    cutmix: Annotated[float, Ge(0)] = 0.0
    mix_share: Annotated[float, Ge(0), Le(1)] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "augmentation")

    @property
    def mixes(self) -> bool:
        """Whether images, and so labels, are mixed."""
        return self.mix_share > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def moves(self) -> bool:
        """Whether pixels move."""
        return self.crop_padding > 0 or self.flip or self.min_scale < 1 or self.strength > 0

    def draw(self, rng: np.random.Generator, count: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Draw the changes of each image of a batch.

        Args:
            rng: source of the random numbers.
            count: B.
            size: height and width in pixels.

        Returns:
            The arguments of `augment` that are needed, by name; and "own_share" [B] if images are mixed, the share of
            each mixed image that comes from the image itself.
        """
        found: dict[str, Any] = {}
        if self.moves:
            found["affine"] = self._affine(rng, count, size)
        if self.strength:
            found["colours"] = self._colours(rng, count)
        if self.erase:
            share = np.where(rng.random(count) < self.erase, rng.uniform(*_ERASED_SHARE, count), 0)
            ratio = np.exp(rng.uniform(*_ERASED_LOG_RATIO, count))
            found["erased"] = _rectangles(rng, share, ratio, size)[0]
        if self.mixes:
            found |= self._mix(rng, count, size)
        return {name: torch.from_numpy(np.ascontiguousarray(x, np.float32)) for name, x in found.items()}

    def _affine(self, rng: np.random.Generator, count: int, size: tuple[int, int]) -> Any:
        """Return [B, 2, 3]: output coordinates (x, y, 1) in [-1, 1] to input coordinates."""
        height, width = size
        matrix = np.tile(np.eye(3), (count, 1, 1))
        if self.min_scale < 1:
            area = rng.uniform(self.min_scale, 1, count)
            stretch = np.exp(rng.uniform(-_CROP_LOG_RATIO, _CROP_LOG_RATIO, count) / 2)
            scale = np.minimum(np.stack([np.sqrt(area) * stretch, np.sqrt(area) / stretch], 1), 1)
            matrix[:, [0, 1], [0, 1]] = scale
            matrix[:, :2, 2] = rng.uniform(-1, 1, (count, 2)) * (1 - scale)
        if self.crop_padding:
            shift = rng.integers(-self.crop_padding, self.crop_padding + 1, (count, 2))
            matrix[:, :2, 2] += 2 * shift / (width, height)
        if self.flip:
            matrix[:, 0] *= np.where(rng.random(count) < 0.5, -1, 1)[:, None]
        if self.strength:
            chosen = np.where(rng.random(count) < _OPERATION_SHARE, rng.integers(0, 5, count), -1)
            amount = rng.uniform(-1, 1, count) * self.strength
            change = np.tile(np.eye(3), (count, 1, 1))
            change[:, 0, 1] = np.where(chosen == 0, amount * _SHEAR, 0)
            change[:, 1, 0] = np.where(chosen == 1, amount * _SHEAR, 0)
            change[:, 0, 2] = np.where(chosen == 2, 2 * amount * _SHIFT, 0)
            change[:, 1, 2] = np.where(chosen == 3, 2 * amount * _SHIFT, 0)
            angle = np.where(chosen == 4, amount * _TURN, 0)
            change[:, 0, 0], change[:, 1, 1] = np.cos(angle), np.cos(angle)
            # coordinates are relative to the size, so a turn of a non-square image must be rescaled
            change[:, 0, 1] -= np.sin(angle) * height / width
            change[:, 1, 0] += np.sin(angle) * width / height
            matrix = change @ matrix
        return matrix[:, :2]

    def _colours(self, rng: np.random.Generator, count: int) -> Any:
        """Return [B, 6]: the factor of each operation in `_COLOURS`, neutral but for one."""
        values = np.tile(np.asarray(_NEUTRAL), (count, 1))
        chosen = np.where(rng.random(count) < _OPERATION_SHARE, rng.integers(0, len(_COLOURS), count), -1)
        amount = rng.uniform(-1, 1, count) * self.strength
        # 256 to 8 levels; the threshold from 1 (nothing is inverted) down
        strengths = [1 + _FACTOR * amount] * 4 + [2 ** (8 - 5 * np.abs(amount)), 1 - np.abs(amount)]
        for i, strength in enumerate(strengths):
            values[:, i] = np.where(chosen == i, strength, values[:, i])
        return values

    def _mix(self, rng: np.random.Generator, count: int, size: tuple[int, int]) -> dict[str, Any]:
        is_mixed = rng.random(count) < self.mix_share
        cuts = rng.random(count) < (0.5 if self.mixup and self.cutmix else float(self.mixup == 0))
        own = np.ones(count)
        if self.mixup:
            own = np.where(is_mixed & ~cuts, rng.beta(self.mixup, self.mixup, count), own)
        found: dict[str, Any] = {"own_weight": own}
        share = own
        if self.cutmix:
            cut = np.where(is_mixed & cuts, 1 - rng.beta(self.cutmix, self.cutmix, count), 0)
            found["cut"], area = _rectangles(rng, cut, np.ones(count), size)
            share = np.where(cuts, 1 - area, own)
        return found | {"own_share": share}


def _rectangles(rng: np.random.Generator, share: Any, ratio: Any, size: tuple[int, int]) -> tuple[Any, Any]:
    """Draw rectangles [B, 4] (top, bottom, left, right) in pixels, cut at the border; return them and their area.

    Args:
        rng: source of the random numbers.
        share: [B], of the image's area; 0 for none.
        ratio: [B], height over width.
        size: height and width of the images.
    """
    height, width = size
    half_height = np.minimum(np.sqrt(share * ratio), 1) * height / 2
    half_width = np.minimum(np.sqrt(share / ratio), 1) * width / 2
    middle_y, middle_x = rng.uniform(0, height, len(share)), rng.uniform(0, width, len(share))
    edges = [middle_y - half_height, middle_y + half_height, middle_x - half_width, middle_x + half_width]
    limits = (height, height, width, width)
    box = np.stack([np.clip(np.round(x), 0, most) for x, most in zip(edges, limits, strict=True)], 1)
    return box, (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)


def augment(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    affine: Tensor | None = None,
    colours: Tensor | None = None,
    erased: Tensor | None = None,
    own_weight: Tensor | None = None,
    cut: Tensor | None = None,
) -> Tensor:
    """Change images as `Augmentation.draw` has drawn, and normalise them.

    Image i is mixed with image B - 1 - i.

    Args:
        images: [B, C, H, W] uint8.
        mean: [C], of values in [0, 1].
        std: [C].
        affine: [B, 2, 3], output to input coordinates.
        colours: [B, 6], factors of colour operations.
        erased: [B, 4], rectangles that become the mean.
        own_weight: [B], weight of the image against the other one.
        cut: [B, 4], rectangles of the other image.

    Returns:
        [B, C, H, W] float32.
    """
    x = images.float() / 255
    if colours is not None:
        x = _change_colours(x, colours)
    if affine is not None:
        grid = functional.affine_grid(affine, list(x.shape), align_corners=False)
        x = functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    x = (x - mean[:, None, None]) / std[:, None, None]
    if erased is not None:
        x = x.masked_fill(_inside(erased, x), 0)
    # from the other image as it was before it was mixed itself, so that shares and labels agree
    other = x.flip(0) if own_weight is not None or cut is not None else x
    if own_weight is not None:
        weight = own_weight[:, None, None, None]
        x = x * weight + other * (1 - weight)
    if cut is not None:
        x = torch.where(_inside(cut, x), other, x)
    return x


def _change_colours(x: Tensor, colours: Tensor) -> Tensor:
    brightness, saturation, contrast, sharpness, levels, threshold = (c[:, None, None, None] for c in colours.unbind(1))
    x = x * brightness
    grey = x
    if x.shape[1] == len(_LUMA):
        grey = _to_grey(x)
        x = grey + saturation * (x - grey)
    middle = grey.mean((2, 3), keepdim=True)
    x = middle + contrast * (x - middle)
    blurred = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = (blurred + sharpness * (x - blurred)).clamp(0, 1)
    # 256 levels are those of the file
    x = torch.where(levels < 256, (x * levels).floor() / levels, x)
    return torch.where(x >= threshold, 1 - x, x)


def _to_grey(x: Tensor) -> Tensor:
    """Return [B, 1, H, W]; without a tensor from the host, whose copy a captured step could not contain."""
    red, green, blue = (x[:, i : i + 1] * weight for i, weight in enumerate(_LUMA))
    return red + green + blue


def _inside(box: Tensor, x: Tensor) -> Tensor:
    """Return [B, 1, H, W]: whether a pixel is in the image's rectangle."""
    rows = torch.arange(x.shape[2], device=x.device)[:, None]
    columns = torch.arange(x.shape[3], device=x.device)
    top, bottom, left, right = (edge[:, None, None] for edge in box.unbind(1))
    return ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))[:, None]
