"""How a run remembers places outside its folder, so that it can be moved together with what lies beside it."""

from __future__ import annotations

import os
from pathlib import Path


def to_kept(run_dir: Path, place: str | Path) -> str:
    """Return a place as a run's config.json keeps it: relative to the run if it lies beside or in it, else absolute."""
    run, found = os.path.realpath(run_dir), os.path.realpath(place)
    is_beside = os.path.commonpath([os.path.dirname(run), found]) == os.path.dirname(run)
    return os.path.relpath(found, run) if is_beside else os.path.abspath(place)


def from_kept(run_dir: Path, kept: str, was_at: str | None) -> Path:
    """Return the place that `to_kept` wrote down.

    Args:
        run_dir: where the run is now.
        kept: what was written down.
        was_at: where the run was then: a copy of a run finds what lies beside the original. None for older runs, which
            kept absolute paths, and whose tokens lie in a folder beside the run by default.
    """
    here = Path(os.path.realpath(run_dir))
    there = here.parent / "prepared" / Path(kept).name if was_at is None else Path(was_at, kept)
    place, other = (Path(os.path.normpath(path)) for path in (here / kept, there))
    return other if not place.exists() and other.exists() else place
