"""Paths in a run's config.json: relative to the run where possible, so that both can be moved together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_saved_path(run_dir: Path, place: str | Path) -> str:
    """Return a path for a run's config.json: relative to the run if it is beside or inside it, else absolute."""
    run, found = os.path.realpath(run_dir), os.path.realpath(place)
    is_beside = os.path.commonpath([os.path.dirname(run), found]) == os.path.dirname(run)
    return os.path.relpath(found, run) if is_beside else os.path.abspath(place)


def from_saved_path(run_dir: Path, saved: str, was_at: str | None) -> Path:
    """Invert `to_saved_path`, even if the run has moved.

    Args:
        run_dir: the current folder of the run.
        saved: the result of `to_saved_path`.
        was_at: the folder of the run when the path was saved, so that a copy of it finds the folders beside the
            original. None for older runs, which saved absolute paths and kept their tokens in a folder beside the run.
    """
    here = Path(os.path.realpath(run_dir))
    there = here.parent / "prepared" / Path(saved).name if was_at is None else Path(was_at, saved)
    place, other = (Path(os.path.normpath(path)) for path in (here / saved, there))
    return other if not place.exists() and other.exists() else place


def was_at(config: Mapping[str, Any]) -> str | None:
    """Return the folder of a run when its config.json was written; None for older runs and runs without data."""
    data = config.get("data")
    found = data.get("run_was_at") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None
