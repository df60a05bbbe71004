"""Packages of others, as if they were installed."""

from __future__ import annotations

from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, entry: str, source: str | None) -> None:
    """Put a package with one entry point on the path.

    Args:
        folder: an empty folder.
        monkeypatch: of the test.
        group: "mixers", "tasks" or "commands".
        entry: the entry point, such as "name = module".
        source: text of the module; None leaves it out.
    """
    module = entry.partition("=")[2].partition(":")[0].strip()
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[hgrn2.{group}]\n{entry}\n")
    if source is not None:
        (folder / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
