"""Sets of Pathfinder images: drawn by several processes, kept on disk with a checksum; and the official files."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np

from hgrn2.data.images.decode import open_image, pillow
from hgrn2.data.lra.pathfinder import BLOCK_IMAGES, draw_block
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.errors import UserError
from hgrn2.storage.staging import staged_directory

# raise it when the drawing of the images changes
_VERSION = 1
_NAMES = ("two curves", "one curve")


def pathfinder_set(size: int, num: int, seed: int, folder: Path, processes: int | None = None) -> LabelledSequences:
    """Return the first images of a seed as sequences [N, size * size], drawn once and then read from disk.

    Args:
        size: pixels of a side.
        num: number of images.
        seed: 0 or more.
        folder: holds a folder for each set.
        processes: number of processes that draw; None for one per core.

    Raises:
        UserError: the set is damaged: remove its folder to draw it again.
    """
    place = folder / f"pathfinder{size}-{num}-seed{seed}-v{_VERSION}"
    if not (place / "manifest.json").is_file():
        _draw(place, size, num, seed, processes)
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        images, labels = np.load(place / "images.npy"), np.load(place / "labels.npy")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{place}: cannot be read ({error}); remove the folder to draw it again", "damaged") from None
    if manifest.get("sha256") != _checksum(images, labels):
        raise UserError(f"{place}: differs from its checksum; remove the folder to draw it again", "damaged")
    return LabelledSequences(images.reshape(num, size * size), None, labels.astype(np.int64), _NAMES)


def _draw(place: Path, size: int, num: int, seed: int, processes: int | None) -> None:
    blocks = range(-(-num // BLOCK_IMAGES))
    count = min(len(blocks), processes or len(os.sched_getaffinity(0)))
    draw = partial(draw_block, size, seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    if count > 1:
        # spawned, since torch's threads do not survive a fork
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            parts = pool.map(draw, blocks, chunksize=1)
    else:
        parts = [draw(block) for block in blocks]
    images, labels = (np.concatenate(found)[:num] for found in zip(*parts, strict=True))
    with staged_directory(place, replace=False) as stage:
        np.save(stage / "images.npy", images)
        np.save(stage / "labels.npy", labels)
        manifest = {"size": size, "images": num, "seed": seed, "sha256": _checksum(images, labels)}
        (stage / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _checksum(images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()


def read_official_pathfinder(folder: Path, size: int) -> LabelledSequences:
    """Read the official files: metadata/*.npy with lines "folder file number label ...", and PNG images (needs Pillow).

    Args:
        folder: such as lra_release/pathfinder32/curv_contour_length_14.
        size: pixels of a side.

    Raises:
        UserError: there is no such file, an image has another size, or a label is neither 0 nor 1. Empty or unreadable
            images are skipped and counted.
    """
    # without Pillow no image could be read
    pillow()
    images, labels, notes = [], [], {}
    for path in sorted((folder / "metadata").glob("*.npy"), key=lambda p: (len(p.stem), p.stem)):
        # names in another encoding are found to be wrong below
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            words = line.split()
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise UserError(f"{path}, line {number}: {line[:80]!r}; wanted folder, file, number, label", "damaged")
            try:
                found = np.asarray(open_image(folder / words[0] / words[1]).convert("L"))
            except UserError:
                notes["unreadable"] = notes.get("unreadable", 0) + 1
                continue
            if found.shape != (size, size):
                raise UserError(
                    f"{words[1]}: is {found.shape[1]} x {found.shape[0]}; wanted {size} x {size}", "mismatch"
                )
            images.append(found.reshape(-1))
            labels.append(int(words[3]))
    if not images:
        raise UserError(f"{folder}: has no images that metadata/*.npy names", "not-found")
    return LabelledSequences(np.stack(images), None, np.array(labels), _NAMES, notes).checked(str(folder))
