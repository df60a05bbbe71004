"""Read image sets whose files hold pixels: idx files, as of MNIST, and CIFAR's binaries and pickles."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.data.images.image_set import ImageSet, check_labels, check_set
from hgrn2.errors import UserError

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_IDX_TRAIN, _IDX_TEST = "train", "t10k"
_UBYTE = 8
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_PIXELS = 3 * 32 * 32
# names of the classes of well-known files, by the start of the SHA-256 of their training labels
_KNOWN_CLASSES = {
    # Fashion-MNIST
    "657fbd221bfc9f41": (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz or .xz.

    Raises:
        UserError: the file cannot be read, or is truncated or corrupt.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except (OSError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be read ({error})", "unreadable") from error


def read_idx(path: Path) -> np.ndarray:
    """Return the array of an idx file of bytes: a magic number, the sizes, the values.

    Raises:
        UserError: it is not such a file, or its length does not match its sizes.
    """
    data = read_bytes(path)
    num_axes = data[3] if len(data) > 3 else 0
    if data[:2] != b"\0\0" or data[2] != _UBYTE or not 1 <= num_axes <= 4:
        found = f"begins with {data[:4].hex()}" if data else "is empty"
        raise UserError(f"{path}: {found}; wanted an idx file of bytes (000008..)", "unreadable")
    start = 4 + 4 * num_axes
    if len(data) < start:
        raise UserError(f"{path}: ends after {len(data)} bytes, within its {num_axes} sizes; fetch it again", "damaged")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_axes))
    if len(data) - start != math.prod(shape):
        raise UserError(
            f"{path}: holds {len(data) - start} values; its sizes say {' x '.join(map(str, shape))}; fetch it again",
            "damaged",
        )
    # copied, since torch warns about read-only arrays
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the paths of images and labels by part: "train" and "t10k"."""
    found = {}
    for part in (_IDX_TRAIN, _IDX_TEST):
        pair = [_one_of(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if pair[0] is not None and pair[1] is not None:
            found[part] = (pair[0], pair[1])
    return found


def _one_of(folder: Path, name: str) -> Path | None:
    # some distributions write a dot: train-images.idx3-ubyte
    for stem in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz", ".xz"):
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    return None


def read_idx_sets(folder: Path) -> dict[str, ImageSet]:
    """Return the sets "train" and "validation" of a folder with idx files, as far as they exist."""
    found: dict[str, ImageSet] = {}
    for part, (images_path, labels_path) in idx_files(folder).items():
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{images_path}: images {images.shape} and labels {labels.shape} do not belong together", "mismatch"
            )
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        name = "train" if part == _IDX_TRAIN else "validation"
        # the validation part may lack a class, so the training labels decide
        num = int(labels.max(initial=0)) + 1
        if "train" in found:
            num = len(found["train"].classes)
            check_labels(labels.astype(np.int64), num, labels_path)
        known = _KNOWN_CLASSES.get(hashlib.sha256(labels.tobytes()).hexdigest()[:16])
        if "train" in found:
            classes = found["train"].classes
        else:
            classes = _class_names(folder, num) or known or tuple(str(i) for i in range(num))
        found[name] = check_set(_set_of(images, labels, classes), folder)
    return found


def _class_names(folder: Path, num: int) -> tuple[str, ...]:
    """Return the names in the folder's classes.txt, one per line; none if there is no such file."""
    path = folder / "classes.txt"
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); wanted the name of a class in each line", "unreadable") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num:
        raise UserError(f"{path}: names {len(names)} classes; the labels have {num}", "mismatch")
    return names


def _set_of(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    images = np.ascontiguousarray(images)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    return ImageSet(labels.astype(np.int64), classes, images, fingerprint=digest)


def cifar_files(folder: Path) -> dict[str, list[Path]]:
    """Return the paths of CIFAR's files by part: binaries (.bin) or pickles of Python, of CIFAR-10 or CIFAR-100."""
    inner = [folder, *(folder / name for name in ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-python"))]
    for place in inner:
        for train, test in (
            (sorted(place.glob("data_batch_*.bin")), place / "test_batch.bin"),
            (sorted(x for x in place.glob("data_batch_*") if not x.suffix), place / "test_batch"),
            ([place / "train.bin"], place / "test.bin"),
            ([place / "train"], place / "test"),
        ):
            if train and test.is_file() and all(path.is_file() for path in train):
                return {"train": train, "validation": [test]}
    return {}


def read_cifar_sets(folder: Path) -> dict[str, ImageSet]:
    """Return the sets "train" and "validation" of a folder with CIFAR's files."""
    parts = {}
    for name, paths in cifar_files(folder).items():
        read = [read_cifar_file(path) for path in paths]
        parts[name] = np.concatenate([x for x, _ in read]), np.concatenate([y for _, y in read])
    # a part may lack a class; the labels of training count
    num = int(parts["train"][1].max(initial=0)) + 1
    for path, (_, labels) in zip((folder, cifar_files(folder)["validation"][0]), parts.values(), strict=True):
        check_labels(labels.astype(np.int64), num, path)
    classes = CIFAR10 if num == len(CIFAR10) else tuple(str(i) for i in range(num))
    return {name: check_set(_set_of(x, y, classes), folder) for name, (x, y) in parts.items()}


def read_cifar_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images [N, 3, 32, 32] uint8 and the labels [N] of one of CIFAR's files, binary or pickled.

    Raises:
        UserError: the file cannot be read ("unreadable"), is truncated ("damaged"), or its pickle holds other objects
            than arrays ("unsupported").
    """
    data = read_bytes(path)
    if path.suffix != ".bin":
        return _read_pickle(path, data)
    # CIFAR-100's files have a coarse label before the fine one
    num_labels = 2 if path.name in ("train.bin", "test.bin") else 1
    width = num_labels + _CIFAR_PIXELS
    if data and len(data) % width == 0:
        rows = np.frombuffer(data, np.uint8).reshape(-1, width)
        return rows[:, num_labels:].reshape(-1, 3, 32, 32), rows[:, num_labels - 1]
    raise UserError(f"{path}: has {len(data)} bytes; wanted a multiple of {width}, it may be truncated", "damaged")


class _Unpickler(pickle.Unpickler):
    """Unpickle arrays only, since a pickle can run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "_reconstruct")} or (
            module == "_codecs" and name == "encode"
        ):
            return super().find_class(module, name)
        raise UserError(f"the pickle asks for {module}.{name}; wanted arrays only", "unsupported")


def _read_pickle(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    import io

    try:
        table = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        pixels = np.asarray(table[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(table.get(b"fine_labels", table.get(b"labels")), np.int64)
    except UserError as error:
        raise UserError(f"{path}: {error}", error.code) from error
    except Exception as error:
        raise UserError(f"{path}: not a pickle of CIFAR ({type(error).__name__}: {error})", "unreadable") from error
    if labels.shape != (len(pixels),):
        raise UserError(f"{path}: {len(pixels)} images and {labels.shape} labels", "mismatch")
    return pixels, labels
