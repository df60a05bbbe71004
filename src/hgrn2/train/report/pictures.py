"""The report's section of pictures that a task has drawn."""

from __future__ import annotations

import base64

from hgrn2.train.report.facts import RunFacts
from hgrn2.train.report.parts import section
from hgrn2.train.report.words import plain, rich

# a larger file would make a page that is slow to open
_MAX_BYTES = 4 * 2**20


def pictures(facts: RunFacts) -> str:
    """Return the task's pictures of RUN/plots with their captions; empty if there are none."""
    shown = []
    for name, caption in facts.task.pictures:
        path = facts.run_dir / "plots" / f"{name}.png"
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if len(content) <= _MAX_BYTES:
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            image = f'<img src="{source}" alt="{plain(caption)}" style="max-width:100%;height:auto">'
            shown.append(f'<p class="note">{rich(caption)}</p>{image}')
    return section("pictures", "Pictures", "\n".join(shown)) if shown else ""
