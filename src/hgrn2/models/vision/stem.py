"""Turn images into tokens: patches, convolutions, and positions."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.shapes import describe


class PatchStem(nn.Module):
    """Project each patch to one token.

    Args:
        in_chans: channels of the images.
        embed_dim: D.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, D, H / patch_size, W / patch_size]."""
        return self.proj(x)


class ConvStem(nn.Module):
    """3 x 3 convolutions, batch norm and GELU; each convolution after the first halves the grid by max pooling.

    arXiv 2104.05704 introduced convolutional stems with pooling instead of patches. The widths double up to embed_dim.

    Args:
        in_chans: channels of the images.
        embed_dim: D.
        patch_size: pixels of a token along each axis, a power of 2.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.num_halvings = int(math.log2(patch_size))
        widths = [in_chans, *(max(8, embed_dim >> i) for i in range(self.num_halvings, 0, -1)), embed_dim]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, D, H / patch_size, W / patch_size]."""
        # the layout in which convolutions run fastest on a GPU
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if i > 0:
                # pooled first, so that norm and activation have a quarter of the pixels
                x = functional.max_pool2d(x, 3, 2, 1)
            x = functional.gelu(norm(x))
        return x


def to_tokens(maps: Tensor) -> Tensor:
    """Return the tokens of a grid, row by row."""
    return maps.flatten(2).transpose(1, 2)


def check_images(x: Tensor, in_chans: int, patch_size: int) -> None:
    """Check the shape of a batch of images.

    Raises:
        UserError: it is not [B, C, H, W], C is not in_chans, or patch_size does not divide H and W.
    """
    if x.dim() != 4:
        raise UserError(f"images are {describe(x)}; wanted [B, {in_chans}, H, W]")
    _, channels, height, width = x.shape
    if channels != in_chans:
        raise UserError(f"images have {channels} channels; wanted in_chans = {in_chans}", "mismatch")
    if height % patch_size or width % patch_size or not height * width:
        raise UserError(
            f"images are {height} x {width}; wanted multiples of patch_size = {patch_size}; resize or pad them",
            "mismatch",
        )


def sincos_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return fixed positions of a grid, [1, rows * columns, width]: sines and cosines of the row and the column.

    The frequencies are those of arXiv 1706.03762, half of the channels for each axis.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=device) / (width // 4))
    parts = []
    for steps, shape in ((rows, (rows, 1, -1)), (columns, (1, columns, -1))):
        angles = torch.arange(steps, device=device)[:, None] * frequencies
        parts.append(torch.cat([angles.sin(), angles.cos()], 1).reshape(shape).expand(rows, columns, -1))
    return torch.cat(parts, 2).reshape(1, rows * columns, width)


def resize_positions(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Return learned positions [1, T, D] for another grid, by bicubic interpolation."""
    if grid == wanted:
        return table
    maps = table.float().transpose(1, 2).unflatten(2, grid)
    return to_tokens(functional.interpolate(maps, wanted, mode="bicubic", align_corners=False)).to(table.dtype)
