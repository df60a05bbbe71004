"""Read image sets of Hugging Face's `datasets`: saved to disk, or as parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.data.images.decode import open_image
from hgrn2.data.images.folders import TRAIN_NAMES, VALIDATION_NAMES
from hgrn2.data.images.image_set import ImageSet, check_set
from hgrn2.errors import MissingPackage, UserError
from hgrn2.extras import install_command

_IMAGE_NAMES, _LABEL_NAMES = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


def is_hub_folder(folder: Path) -> bool:
    """Return whether a folder was written by save_to_disk, or holds parquet files."""
    names = ("dataset_dict.json", "dataset_info.json", "state.json")
    return any((folder / name).is_file() for name in names) or bool(_parquet_files(folder))


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def read_hub_sets(folder: Path) -> dict[str, ImageSet]:
    """Return the sets "train" and "validation" of a folder, as far as they exist.

    Raises:
        UserError: `datasets` is not installed, or there is no column of images or of labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(f"{folder}: Hugging Face sets need datasets: {install_command('data')}") from error
    files = _parquet_files(folder)
    try:
        splits: Any = _load_parquet(datasets, files) if files else datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: datasets cannot read it ({error})", "unreadable") from error
    if not isinstance(splits, Mapping):
        splits = {"train": splits}
    found = {}
    for part, names in (("train", TRAIN_NAMES), ("validation", VALIDATION_NAMES)):
        name = next((name for name in names if name in splits), None)
        if name is not None:
            found[part] = _read_split(splits[name], f"{folder}, split {name}", datasets)
    if "train" not in found:
        raise UserError(f"{folder}: splits are {', '.join(splits)}; wanted one named train", "not-found")
    return found


def _load_parquet(datasets: Any, files: list[Path]) -> dict[str, Any]:
    by_split: dict[str, list[str]] = {}
    for path in files:
        split = next((x for x in (*TRAIN_NAMES, *VALIDATION_NAMES) if path.name.startswith(x)), "train")
        by_split.setdefault(split, []).append(str(path))
    return {split: datasets.Dataset.from_parquet(paths) for split, paths in by_split.items()}


def _read_split(table: Any, where: str, datasets: Any) -> ImageSet:
    columns = table.column_names
    image = next((x for x in _IMAGE_NAMES if x in columns), None)
    label = next((x for x in _LABEL_NAMES if x in columns), None)
    if image is None or label is None:
        raise UserError(
            f"{where}: columns are {', '.join(columns)}; wanted one of {', '.join(_IMAGE_NAMES)} and one of "
            f"{', '.join(_LABEL_NAMES)}",
            "not-found",
        )
    values = table[label][:]
    if missing := [i for i, x in enumerate(values) if x is None]:
        raise UserError(
            f"{where}: image {missing[0]} has no label ({len(missing)} such images); leave them out", "invalid-value"
        )
    values = np.asarray(values)
    names = getattr(table.features[label], "names", None)
    if names is None:
        names = sorted({str(x) for x in values}, key=lambda x: (len(x), x))
        values = np.asarray([names.index(str(x)) for x in values])
    table = table.cast_column(image, datasets.Image(decode=False))

    def read(i: int) -> Any:
        entry = table[i][image]
        source = entry.get("bytes") if isinstance(entry, dict) else entry
        return open_image(source if source is not None else Path(entry["path"]))

    fingerprint = str(getattr(table, "_fingerprint", ""))
    found = ImageSet(values.astype(np.int64), tuple(names), read=read, names=lambda i: f"{i}", fingerprint=fingerprint)
    return check_set(found, where)
