"""Decode image files to 8-bit grey or RGB pixels.

| file | result |
| --- | --- |
| palette, CMYK, YCbCr, Lab | converted to RGB |
| alpha channel | blended over white |
| 16-bit grey | the upper 8 bits |
| 32-bit integers, floats | refused: their range is unknown |
| several frames | the first |
| EXIF orientation | applied |
| corrupt, truncated | refused |
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.data.images.image_set import Pixels
from hgrn2.errors import MissingPackage, UserError
from hgrn2.extras import install_command

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# a side of more pixels would take gigabytes to decode
_MAX_PIXELS = 2**28


def pillow() -> Any:
    """Return the module PIL.Image.

    Raises:
        UserError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackage(f"images need Pillow: {install_command('images')}") from error
    return Image


def open_image(source: Path | bytes) -> Any:
    """Decode an image to PIL's mode "L" or "RGB".

    Args:
        source: a file, or its content.

    Raises:
        UserError: the file is corrupt ("damaged"), or of a kind that is refused ("unsupported").
    """
    image_module = pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            # a decompression bomb is checked below
            warnings.simplefilter("ignore")
            with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size = image.width, image.height
                if size[0] * size[1] > _MAX_PIXELS:
                    raise UserError(f"{size[0]} x {size[1]} pixels; wanted at most {_MAX_PIXELS}", "unsupported")
                image.load()
                return _to_plain(ImageOps.exif_transpose(image), image_module)
    except UserError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and others
        raise UserError(f"not a readable image ({type(error).__name__}: {error})", "damaged") from error


def _to_plain(image: Any, image_module: Any) -> Any:
    mode = image.mode
    if mode in ("L", "RGB"):
        return _blended(image, image_module) if "transparency" in image.info else image
    if mode == "1":
        return image.convert("L")
    if mode.startswith("I;16"):
        return image_module.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if mode == "I":
        # Pillow's mode for 16-bit grey of some formats
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("32-bit pixels; convert it to 8 bits", "unsupported")
        return image_module.fromarray((values >> 8).astype(np.uint8))
    if mode == "F":
        raise UserError("pixels are floats; convert it to 8 bits", "unsupported")
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _blended(image, image_module)
    return image.convert("RGB")


def _blended(image: Any, image_module: Any) -> Any:
    """Return an image with transparency over white."""
    image = image.convert("RGBA")
    return image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image).convert("RGB")


def resize_and_crop(image: Any, size: tuple[int, int]) -> Any:
    """Resize an image until it covers size (height, width), and crop its centre."""
    height, width = size
    if (image.height, image.width) == (height, width):
        return image
    scale = max(height / image.height, width / image.width)
    new = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(new, pillow().Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Any, channels: int) -> Pixels:
    """Return the pixels [C, H, W] of an image of mode "L" or "RGB".

    Args:
        image: PIL's image.
        channels: 1 for grey (ITU-R 601), 3 for RGB.
    """
    values = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return np.ascontiguousarray(values[None] if channels == 1 else values.transpose(2, 0, 1))
