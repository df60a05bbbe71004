"""Find the training and validation images of a folder, in any of the formats."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from hgrn2.data.images.arrays import cifar_files, idx_files, read_cifar_sets, read_idx_sets
from hgrn2.data.images.decode import resize_and_crop, to_pixels
from hgrn2.data.images.folders import parts_of, read_folder
from hgrn2.data.images.hub import is_hub_folder, read_hub_sets
from hgrn2.data.images.image_set import ImageSet, Pixels, check_same_classes, check_set, hold_out
from hgrn2.errors import UserError

# share of unreadable files above which the whole folder is refused
_MAX_SKIPPED = 0.5
# images whose colours decide on the number of channels
_SAMPLED = 16


def open_sets(data: str, validation: str | None, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return the training and the validation images.

    Args:
        data: a folder of class folders (or with the parts train and val of them), of idx files, of CIFAR's files, or
            of a Hugging Face set.
        validation: such a folder of validation images; None means those of `data`, or a part of its images held out.
        share: share of the images to hold out.
        seed: seed of the images held out.

    Raises:
        UserError: there are no images, they cannot be read, or the parts have different classes.
    """
    parts = dict(_read(data))
    if validation is not None:
        other = _read(validation)
        parts["validation"] = other.get("validation") or other["train"]
    if "validation" not in parts:
        return hold_out(parts["train"], share, seed)
    check_same_classes(parts["train"], parts["validation"], data if validation is None else validation)
    return parts["train"], _with_classes(parts["validation"], parts["train"].classes)


def _with_classes(found: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """Return a set with its classes in another order."""
    if found.classes == classes:
        return found
    places = np.asarray([classes.index(name) for name in found.classes], np.int64)
    return replace(found, labels=places[found.labels], classes=classes)


def _read(data: str) -> dict[str, ImageSet]:
    if not Path(data).is_dir():
        raise UserError(f"{data}: no such folder; name a folder of images with --data", "not-found")
    return read_parts(os.path.realpath(data))


# cached, since the data is read once for the model settings and again by the task
@functools.lru_cache(maxsize=2)
def read_parts(data: str) -> dict[str, ImageSet]:
    """Return the sets "train" and, if there is one, "validation" of a folder; the last two results are cached.

    Args:
        data: absolute path of the folder.
    """
    folder = Path(data)
    if idx_files(folder):
        found = read_idx_sets(folder)
    elif cifar_files(folder):
        found = read_cifar_sets(folder)
    elif is_hub_folder(folder):
        found = read_hub_sets(folder)
    else:
        found = {part: read_folder(place) for part, place in parts_of(folder).items()}
    if "train" not in found:
        raise UserError(f"{data}: has validation images only; wanted training images", "not-found")
    return found


def guess_channels(found: ImageSet) -> int:
    """Return the channels of a set: 1 if its first sixteen images are all grey, otherwise 3."""
    if found.images is not None:
        return found.images.shape[1]
    assert found.read is not None
    modes = []
    for i in range(min(_SAMPLED, len(found))):
        try:
            modes.append(found.read(i).mode)
        except UserError:
            continue
    return 1 if modes and all(mode == "L" for mode in modes) else 3


def decode_set(found: ImageSet, size: tuple[int, int], channels: int, workers: int, where: str) -> ImageSet:
    """Return a set with all images in memory, resized and cropped to a size; unreadable ones are left out.

    Args:
        found: the set.
        size: height and width.
        channels: 1 for grey, 3 for RGB.
        workers: threads that decode.
        where: name of the data, for messages.

    Raises:
        UserError: a class has no readable image, or half of all images cannot be read.
    """
    if found.images is not None:
        return replace(found, images=_fit(found.images, size, channels))
    read = found.read
    assert read is not None

    def decode(i: int) -> Pixels | str:
        try:
            return to_pixels(resize_and_crop(read(i), size), channels)
        except UserError as error:
            return error.code

    with ThreadPoolExecutor(max(1, workers)) as pool:
        decoded = list(pool.map(decode, range(len(found))))
    skipped: dict[str, int] = dict(found.skipped)
    for result in decoded:
        if isinstance(result, str):
            skipped[result] = skipped.get(result, 0) + 1
    rows = np.asarray([i for i, x in enumerate(decoded) if not isinstance(x, str)], np.int64)
    if len(rows) < len(found) * (1 - _MAX_SKIPPED):
        first = next(i for i, x in enumerate(decoded) if isinstance(x, str))
        raise UserError(
            f"{where}: {len(found) - len(rows)} of {len(found)} images cannot be read, such as {found.names(first)}; "
            "check the files",
            "unreadable",
        )
    kept = replace(found.select(rows), skipped=skipped, read=None)
    images = np.stack([x for x in decoded if not isinstance(x, str)])
    return check_set(replace(kept, images=images), where)


def _fit(images: Pixels, size: tuple[int, int], channels: int) -> Pixels:
    """Return decoded images in another size, or with other channels."""
    if images.shape[1:] == (channels, *size):
        return images
    from hgrn2.data.images.decode import pillow

    if images.shape[1] not in (1, 3):
        raise UserError(f"images have {images.shape[1]} channels; wanted 1 or 3", "unsupported")
    make = pillow().fromarray
    grey = images.shape[1] == 1
    found = (make(x[0]) if grey else make(np.ascontiguousarray(x.transpose(1, 2, 0))) for x in images)
    return np.stack([to_pixels(resize_and_crop(image, size), channels) for image in found])
