"""The report's section about classes: the confusion matrix, and the classes with the lowest accuracy."""

from __future__ import annotations

import json
from typing import Any

from hgrn2.train.report.facts import RunFacts
from hgrn2.train.report.parts import section
from hgrn2.train.report.words import plain, rich


def classes(facts: RunFacts) -> str:
    """Return the confusion matrix of the newest validation, and its worst classes."""
    newest = facts.measured[-1] if facts.measured else {}
    worst, found = newest.get("val_worst_classes"), _read(newest.get("val_confusion"))
    if not isinstance(worst, str) and found is None:
        return ""
    body = f'<p class="note">Classes with the lowest accuracy: {rich(worst)}.</p>' if worst else ""
    if found is not None:
        body += _picture(*found)
    return section("classes", "Classes", body)


def _read(text: Any) -> tuple[list[str], list[list[int]]] | None:
    """Return names and counts, or None if the record has another form."""
    try:
        found = json.loads(text)
        names, counts = [str(name) for name in found["classes"]], found["counts"]
        is_square = len(counts) == len(names) and all(len(row) == len(names) for row in counts)
        is_counted = all(type(count) is int and count >= 0 for row in counts for count in row)
    except (TypeError, ValueError, KeyError):
        return None
    return (names, counts) if names and is_square and is_counted else None


def _picture(names: list[str], counts: list[list[int]]) -> str:
    head = "".join(f'<th scope="col">{rich(name)}</th>' for name in names)
    rows = []
    for index, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = max(1, sum(row))
        cells = ""
        for place, (other, count) in enumerate(zip(names, row, strict=True)):
            colour = "train" if place == index else "held-out"
            shade = f"background:color-mix(in srgb, var(--{colour}) {round(70 * count / total)}%, transparent)"
            cells += f'<td title="{plain(name)} as {plain(other)}" style="{shade}">{count:,}</td>'
        rows.append(f'<tr><th scope="row">{rich(name)}</th>{cells}</tr>')
    note = (
        "Held-out examples by class (row) and by the class with the highest logit (column); shades are shares of a row."
    )
    return (
        f'<p class="note">{note}</p><div class="scroll" tabindex="0"><table class="confusion">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
