"""Tell how to install missing optional dependencies."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """Return the pip command that adds an extra to this installation.

    Args:
        extra: a key of the project's optional dependencies, e.g. "data".
    """
    source = Path(__file__).resolve().parents[2]
    if (source / "pyproject.toml").is_file():
        # without -e pip would replace an editable installation by a copy
        return f"pip install -e {_requirement(source, extra)}"
    installed_from = _installed_from()
    if installed_from is not None and (installed_from / "pyproject.toml").is_file():
        return f"pip install {_requirement(installed_from, extra)}"
    return f"pip install 'hgrn2[{extra}]'"


def _requirement(folder: Path, extra: str) -> str:
    return f"'.[{extra}]'" if folder == Path.cwd() else shlex.quote(f"{folder}[{extra}]")


def _installed_from() -> Path | None:
    """Return the folder that pip installed the package from; None for an index or a file."""
    try:
        text = importlib.metadata.distribution("hgrn2").read_text("direct_url.json")
        url = urlsplit(json.loads(text or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    return Path(url2pathname(url.path)) if url.scheme == "file" else None
