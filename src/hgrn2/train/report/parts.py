"""HTML building blocks of the report's sections."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hgrn2.train.report.words import rich

_MAX_VALUE_CHARACTERS = 300


def section(key: str, heading: str, body: str) -> str:
    """Return a section with a heading; the key is its anchor."""
    return (
        f'<section id="{key}" aria-labelledby="{key}-heading">\n'
        f'<h2 id="{key}-heading">{heading}</h2>\n{body}\n</section>\n'
    )


def code(text: str) -> str:
    """Return a block of code for copying."""
    return f'<pre class="code" tabindex="0" dir="ltr"><code>{rich(text)}</code></pre>'


def pairs(found: Iterable[tuple[str, Any]]) -> str:
    """Return names and values in columns; an empty string if there are none."""
    cells = "".join(f"<div><dt>{rich(name)}</dt><dd>{rich(_value(value))}</dd></div>" for name, value in found)
    return f'<dl class="pairs">{cells}</dl>' if cells else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table; the first column holds the row headers."""
    titles = "".join(f'<th scope="col">{rich(title)}</th>' for title in head)
    lines = [
        f'<tr><th scope="row">{rich(first)}</th>{"".join(f"<td>{rich(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    ]
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(title: str, body: str) -> str:
    """Return a collapsed block under a title."""
    return f"<details><summary>{rich(title)}</summary>{body}</details>"


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "…"
