"""CIFAR-10 as sequences of pixels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgrn2.data.images.arrays import CIFAR10, read_cifar_file
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.errors import UserError

_SIDE = 32
# ITU-R 601
_GREY = np.array([0.2989, 0.5870, 0.1140])
_TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


def read_cifar(folder: Path, split: str, is_grey: bool) -> LabelledSequences:
    """Read CIFAR-10 as sequences of 1,024 pixels, row by row.

    Args:
        folder: holds the official binary files (data_batch_1.bin to 5, test_batch.bin), or train.npz and test.npz with
            images [N, 32, 32, 3] or grey [N, 32, 32], both uint8, and labels [N].
        split: "train" or "test".
        is_grey: grey values [N, 1024] instead of colours [N, 1024, 3].

    Raises:
        UserError: files are missing, truncated or of another shape, or labels are out of range.
    """
    path = folder / f"{split}.npz"
    if path.is_file():
        images, labels = _read_npz(path)
    else:
        parts = [_read_binary(folder / name) for name in (_TRAIN_FILES if split == "train" else ("test_batch.bin",))]
        images, labels = (np.concatenate(found) for found in zip(*parts, strict=True))
    if images.ndim == 4 and is_grey:
        images = np.rint(images @ _GREY).astype(np.uint8)
    elif images.ndim == 3 and not is_grey:
        raise UserError(f"{folder}: its images are grey; wanted colours", "mismatch")
    inputs = images.reshape(len(images), _SIDE * _SIDE, *images.shape[3:])
    return LabelledSequences(inputs, None, labels.astype(np.int64), CIFAR10).checked(str(folder))


def _read_binary(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted CIFAR-10's binary files, or train.npz and test.npz", "not-found")
    images, labels = read_cifar_file(path)
    return images.transpose(0, 2, 3, 1), labels


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        # numpy leaves a file open that is not a zip file
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); wanted arrays images and labels", "damaged") from None
    if images.dtype != np.uint8 or images.shape[1:] not in ((_SIDE, _SIDE), (_SIDE, _SIDE, 3)):
        raise UserError(
            f"{path}: images is {images.dtype} {list(images.shape)}; wanted uint8 [N, 32, 32(, 3)]", "mismatch"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: labels is {labels.dtype} {list(labels.shape)}; wanted integers [{len(images)}], one per image",
            "mismatch",
        )
    return images, labels
