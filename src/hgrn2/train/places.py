"""Paths in a run's config.json: relative to the run where possible, so that both can be moved together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_saved_path(run_dir: Path, place: str | Path) -> str:
    """Return a path for a run's config.json: relative to the run if it lies beside or in it, else absolute."""
    run, found = os.path.realpath(run_dir), os.path.realpath(place)
    is_beside = os.path.commonpath([os.path.dirname(run), found]) == os.path.dirname(run)
    return os.path.relpath(found, run) if is_beside else os.path.abspath(place)


def from_saved_path(run_dir: Path, saved: str, was_at: str | None) -> Path:
    """Return the path that `to_saved_path` was given, wherever the run is now.

    Args:
        run_dir: where the run is now.
        saved: what `to_saved_path` returned.
        was_at: where the run was when it was saved, so that a copy of it finds what lies beside the original. None for
            older runs, which saved absolute paths and by default kept their tokens in a folder beside the run.
    """
    here = Path(os.path.realpath(run_dir))
    there = here.parent / "prepared" / Path(saved).name if was_at is None else Path(was_at, saved)
    place, other = (Path(os.path.normpath(path)) for path in (here / saved, there))
    return other if not place.exists() and other.exists() else place


def was_at(config: Mapping[str, Any]) -> str | None:
    """Return where a run was when its config.json was written; None for older runs, and runs without data."""
    data = config.get("data")
    found = data.get("run_was_at") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None
