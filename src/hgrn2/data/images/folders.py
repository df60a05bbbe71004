"""Read image folders: one folder of files per class."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from hgrn2.data.images.decode import SUFFIXES, open_image
from hgrn2.data.images.image_set import ImageSet, check_set
from hgrn2.errors import UserError

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "test")


def parts_of(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts "train" and "validation"; the folder itself is "train" if it has no parts."""
    found = {}
    for part, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        for name in names:
            if (folder / name).is_dir() and part not in found:
                found[part] = folder / name
    return found if "train" in found else {"train": folder}


def read_folder(folder: Path) -> ImageSet:
    """Return the images of a folder with one folder per class; they are decoded when they are read.

    Hidden files and files with other endings than `decode.SUFFIXES` are ignored.

    Raises:
        UserError: there are no class folders, or a class has no images.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(
            f"{folder}: no folders of classes; wanted CLASS/IMAGE.png, idx files, CIFAR's files or a Hugging Face set",
            "not-found",
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(
            path for path in (folder / name).rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
        )  # fmt: skip
        paths += own
        labels += [label] * len(own)
    digest = hashlib.sha256("\n".join(str(path.relative_to(folder)) for path in paths).encode()).hexdigest()[:16]
    found = ImageSet(
        np.asarray(labels, np.int64), tuple(classes), read=lambda i: open_image(paths[i]),
        names=lambda i: str(paths[i].relative_to(folder)), fingerprint=digest,
    )  # fmt: skip
    return check_set(found, folder)
