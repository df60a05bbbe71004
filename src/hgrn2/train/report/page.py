"""Assemble the report's sections into a page and write it to a file."""

from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

import hgrn2
from hgrn2.storage.staging import write_text_atomic
from hgrn2.train.curves import Record, smooth, thin
from hgrn2.train.report import sections
from hgrn2.train.report.charts import MAX_POINTS
from hgrn2.train.report.confusion import classes
from hgrn2.train.report.facts import RunFacts, figure
from hgrn2.train.report.pictures import pictures
from hgrn2.train.report.words import plain, rich

REPORT_NAME = "report.html"

_SECTIONS = (
    sections.summary, sections.learning, classes, pictures, sections.samples, sections.memory, sections.running,
    sections.next_steps, sections.data, sections.settings, sections.events,
)  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run folder from its metrics.jsonl, config.json and gates.npz.

    Args:
        run_dir: the run folder; the run may be unfinished.

    Returns:
        The path of the report.

    Raises:
        UserError: metrics.jsonl is missing or damaged.
        OSError: the file cannot be written; an earlier report stays as it was.
    """
    path = run_dir / REPORT_NAME
    write_text_atomic(path, render(RunFacts.read(run_dir)))
    return path


def render(facts: RunFacts) -> str:
    """Return the whole page."""
    body = "".join(section(facts) for section in _SECTIONS)
    name = facts.run_dir.resolve().name
    return assemble("HGRN2 training report", name, body, "the run's own records", series(facts))


def assemble(kind: str, name: str, body: str, source: str, points: Any, style: str = "") -> str:
    """Return a self-contained page.

    Args:
        kind: what kind of report it is, shown above the name.
        name: heading and title.
        body: the sections, as HTML.
        source: where its numbers come from, for the last line.
        points: JSON values for the interactive read-out.
        style: further CSS.
    """
    here = files("hgrn2.train.report")
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        kind=plain(kind),
        title=plain(name),
        style=(here / "page.css").read_text(encoding="utf-8") + style,
        name=rich(name),
        sections=body,
        source=rich(source),
        # "<" in the data could close the script element
        points=json.dumps(points, allow_nan=False).replace("<", "\\u003c"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        version=plain(hgrn2.__version__),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def series(facts: RunFacts) -> dict[str, Any]:
    """Return the data behind the curves, thinned out, for the interactive read-out.

    Returns:
        "train" and "validation", each a dict of equally long lists, and "counted", the unit of tokens; empty before the
        first step.
    """
    train = facts.train
    if not train:
        return {}
    chosen = thin(len(train), MAX_POINTS)
    smoothed = smooth(np.array([r["loss"] for r in train], dtype=float))
    keys = ("step", "tokens", "elapsed_s", "loss", "learning_rate", "grad_norm", "tokens_per_s")
    held_out = [facts.measured[i] for i in thin(len(facts.measured), MAX_POINTS)]
    return {
        "counted": facts.task.counted,
        "train": _columns([train[i] for i in chosen], keys)
        | {"smoothed": [round(float(smoothed[i]), 4) for i in chosen]},
        "validation": _columns(held_out, ("step", "tokens", "elapsed_s", "val_loss", "val_bits_per_byte")),
    }


def _columns(records: list[Record], keys: tuple[str, ...]) -> dict[str, list[Any]]:
    return {key: [figure(r, key) for r in records] for key in keys}
