"""Show the progress of training: a live panel on a terminal, plain lines elsewhere.

A closed terminal or pipe does not stop training; output that cannot be written is dropped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console, ConsoleRenderable, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from hgrn2.errors import visible

# width of two pairs of a name and a figure
_TWO_PAIRS = 60


class Display(Protocol):
    """Shows the records of metrics.jsonl as they are written."""

    def __enter__(self) -> Display:
        """Start the display."""
        ...

    def __exit__(self, *error: object) -> None:
        """Stop the display; the last state stays on the screen."""
        ...

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Show a training step; progress is the used fraction of the budget."""
        ...

    def validation(self, record: dict[str, Any]) -> None:
        """Show a validation."""
        ...

    def sample(self, record: dict[str, Any]) -> None:
        """Show a sample."""
        ...

    def note(self, text: str) -> None:
        """Show a line."""
        ...


def make_display(console: Console | None = None, counted: str = "tokens") -> Display:
    """Return the live display on a terminal, plain lines elsewhere; both on standard error.

    Args:
        console: the terminal; None means standard error.
        counted: unit of the budget, in the plural.
    """
    console = console or Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, counted)
    return PlainDisplay(counted=counted)


class PlainDisplay:
    """Print one line every few seconds, for logs.

    Args:
        every_s: minimum time between training lines; validations, samples and notes are always printed.
        counted: unit of the budget, in the plural.
    """

    def __init__(self, every_s: float = 10.0, counted: str = "tokens") -> None:
        self._every_s, self._counted = every_s, counted
        self._last_s = -float("inf")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Print a line, unless the last one was printed less than every_s ago."""
        if time.monotonic() - self._last_s < self._every_s and progress < 1.0:
            return
        self._last_s = time.monotonic()
        skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
        self.note(
            f"step {record['step']}  {progress:4.0%}  loss {_loss(record['smoothed_loss'])}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} {self._counted}/s  "
            f"left {duration(eta_s)}  {size(record['memory_bytes'])}{skipped}"
        )

    def validation(self, record: dict[str, Any]) -> None:
        """Print a line."""
        self.note(f"step {record['step']}  validation: {validation_text(record)}")

    def sample(self, record: dict[str, Any]) -> None:
        """Print the text between two rules of dashes."""
        self.note(f"step {record['step']}  sample:\n{'-' * 40}\n{visible(record['text'])}\n{'-' * 40}")

    def note(self, text: str) -> None:
        """Print the line."""
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class SilentDisplay:
    """Shows nothing: for ranks other than the main one."""

    def __enter__(self) -> SilentDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Drop the record."""

    def validation(self, record: dict[str, Any]) -> None:
        """Drop the record."""

    def sample(self, record: dict[str, Any]) -> None:
        """Drop the record."""

    def note(self, text: str) -> None:
        """Drop the line."""


class _ResizedLive(Live):
    """A live panel that is erased completely when the terminal becomes narrower.

    The terminal then wraps the lines on the screen, so the panel has more rows than rich erases.
    """

    _panel: RenderableType = ""
    _width = 0
    _drawn: Sequence[int] = ()

    def get_renderable(self) -> RenderableType:
        """Return the panel to draw, and remember it."""
        self._panel = super().get_renderable()
        return self._panel

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Erase the rows added by wrapping before rich erases the rows it has drawn."""
        width, height = self.console.size
        if width < self._width:
            added = sum(max(length - 1, 0) // width for length in self._drawn)
            erase = [ControlType.CARRIAGE_RETURN, *[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * added]
            renderables = [Control(*erase), *super().process_renderables(renderables)]
        else:
            renderables = super().process_renderables(renderables)
        lines = self.console.render_lines(self._panel, pad=False)
        self._width, self._drawn = width, [Segment.get_line_length(line) for line in lines[:height]]
        return renderables


class LiveDisplay:
    """Show a panel with progress, figures, the last validation and the last sample."""

    def __init__(self, console: Console, counted: str = "tokens") -> None:
        self._console, self._counted = console, counted
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=1.0, left="?")
        self._record: dict[str, Any] = {}
        self._validation = "none yet"
        self._sample = ""
        self._live = _ResizedLive(get_renderable=self._panel, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        with suppress(OSError):
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        # this draws the last state
        with suppress(OSError):
            self._live.stop()

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Update the bar and the figures."""
        self._record = record
        self._bar.update(self._task, completed=min(progress, 1.0), left=duration(eta_s))

    def validation(self, record: dict[str, Any]) -> None:
        """Replace the last validation."""
        self._validation = f"{validation_text(record)}  (step {record['step']})"

    def sample(self, record: dict[str, Any]) -> None:
        """Replace the last sample."""
        self._sample = visible(record["text"])

    def note(self, text: str) -> None:
        """Print a line above the panel."""
        with suppress(OSError):
            self._console.print(Text(text))

    def _panel(self) -> Group:
        figures = Table.grid(padding=(0, 3))
        record = self._record
        if record:
            pairs = [
                ("step", f"{record['step']:,}"),
                (self._counted, f"{record['tokens']:,}"),
                ("loss", _loss(record["loss"])),
                ("smoothed", _loss(record["smoothed_loss"])),
                ("learning rate", f"{record['learning_rate']:.2e}"),
                (f"{self._counted}/s", f"{record['tokens_per_s']:,.0f}"),
                ("memory", size(record["memory_bytes"])),
                ("skipped steps", str(record["skipped_steps"])),
            ]
            # two pairs do not fit a narrow terminal
            num_pairs = 2 if self._console.width >= _TWO_PAIRS else 1
            for i in range(0, len(pairs), num_pairs):
                figures.add_row(*(word for pair in pairs[i : i + num_pairs] for word in pair))
        lines = Group(self._bar, figures, Text(f"validation  {self._validation}"))
        if not self._sample:
            return Group(lines)
        return Group(lines, Panel(Text("\n".join(self._sample.splitlines()[:12])), title="sample", title_align="left"))


def validation_text(record: dict[str, Any]) -> str:
    """Return the figures of a validation record in words."""
    parts = [f"loss {record['val_loss']:.4f}"]
    if "val_perplexity" in record:
        parts.append(f"perplexity {record['val_perplexity']:.2f} per token")
    if record.get("val_bits_per_byte") is not None:
        parts.append(f"{record['val_bits_per_byte']:.4f} bits per byte")
    if "val_accuracy" in record:
        parts.append(f"accuracy {record['val_accuracy']:.1%}")
    return ", ".join(parts)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """Return a duration such as 1:02:03 or 4:05; a question mark for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size(num_bytes: float) -> str:
    """Return a size such as 900 B or 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1024 and len(units) > 1:
        num_bytes /= 1024
        units.pop(0)
    return f"{num_bytes:,.0f} B" if units[0] == "B" else f"{num_bytes:,.1f} {units[0]}"
