"""Show the progress of a comparison: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import PlannedRun
from hgrn2.errors import visible
from hgrn2.train.display import duration

# between two plain lines about the whole grid
_EVERY_S = 30.0


class GridProgress:
    """Progress of every run, and an estimate of the time that is left.

    Args:
        runs: all runs.
        pending: folders of those that have not ended yet.
        jobs: runs side by side.

    Attributes:
        running: last progress message of each active run by folder; None before the first.
    """

    def __init__(self, runs: Sequence[PlannedRun], pending: Collection[str], jobs: int) -> None:
        self._runs = {run.folder: run for run in runs}
        self._pending = set(pending)
        self._jobs = jobs
        self.running: dict[str, Any] = {}
        self._started_s: dict[str, float] = {}
        self._first: dict[str, float] = {}
        # seconds of whole runs that ended here, by (task, model)
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self.num_diverged = self.num_failed = 0

    @property
    def num_runs(self) -> int:
        """Number of runs of the grid."""
        return len(self._runs)

    @property
    def num_ended(self) -> int:
        """Number of runs that have ended."""
        return len(self._runs) - len(self._pending)

    @property
    def fraction(self) -> float:
        """Fraction of the grid that is done, counting parts of runs."""
        parts = sum(message.fraction for message in self.running.values() if message is not None)
        return min(1.0, (self.num_ended + parts) / max(1, self.num_runs))

    def start(self, folder: str) -> None:
        """Count a run as active."""
        self.running[folder] = None
        self._started_s[folder] = time.monotonic()

    def update(self, folder: str, message: Any) -> None:
        """Take a progress message of an active run."""
        self._first.setdefault(folder, message.fraction)
        self.running[folder] = message

    def end(self, folder: str, outcome: Outcome | None) -> None:
        """Count a run as ended; None means that it was stopped and continues later."""
        self.running.pop(folder, None)
        if outcome is None:
            return
        self._pending.discard(folder)
        self.num_diverged += outcome.state == "diverged"
        self.num_failed += outcome.state == "failed"
        # a resumed run says little about a whole one
        if outcome.state == "finished" and self._first.get(folder, 0.0) < 0.2:
            self._seconds.setdefault(self._cell(folder), []).append(time.monotonic() - self._started_s[folder])

    def left_s(self) -> float | None:
        """Return an estimate of the seconds left; None before anything is known.

        A run takes as long as the mean of ended runs of its task and model, else of its task, else of all. An active
        run that has shown progress is estimated from that.
        """
        known = dict(self._seconds)
        for folder, message in self.running.items():
            if message is not None and message.fraction - self._first[folder] > 0.02:
                spent_s = time.monotonic() - self._started_s[folder]
                known.setdefault(self._cell(folder), []).append(spent_s / (message.fraction - self._first[folder]))
        if not known:
            return None
        total_s = 0.0
        for folder in self._pending:
            message = self.running.get(folder)
            total_s += _estimate(known, *self._cell(folder)) * (1.0 - (message.fraction if message else 0.0))
        return total_s / max(1, min(self._jobs, len(self._pending)))

    def _cell(self, folder: str) -> tuple[str, str]:
        run = self._runs[folder]
        return run.task_entry, run.model


def _estimate(known: dict[tuple[str, str], list[float]], task: str, model: str) -> float:
    same = known.get((task, model)) or [s for (other, _), found in known.items() if other == task for s in found]
    found = same or [s for seconds in known.values() for s in seconds]
    return sum(found) / len(found)


class GridDisplay(Protocol):
    """Shows the progress of a comparison."""

    def __enter__(self) -> GridDisplay:
        """Start the display."""
        ...

    def __exit__(self, *error: object) -> None:
        """Stop the display."""
        ...

    def show(self, progress: GridProgress) -> None:
        """Show the whole grid."""
        ...

    def ended(self, run: PlannedRun, outcome: Outcome | None, progress: GridProgress) -> None:
        """Show that a run has ended; None means that it was stopped."""
        ...


def make_grid_display(console: Console | None = None) -> GridDisplay:
    """Return the live display on a terminal, plain lines elsewhere; both on standard error."""
    console = console or Console(stderr=True)
    return LiveGrid(console) if console.is_terminal and not console.is_dumb_terminal else PlainGrid()


class PlainGrid:
    """Print a line for each run that ends, and one about the grid every half minute."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __enter__(self) -> PlainGrid:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, progress: GridProgress) -> None:
        """Print a line, unless the last one is recent."""
        if time.monotonic() - self._last_s >= _EVERY_S:
            self._last_s = time.monotonic()
            _print(summary_line(progress))

    def ended(self, run: PlannedRun, outcome: Outcome | None, progress: GridProgress) -> None:
        """Print a line."""
        self._last_s = time.monotonic()
        _print(f"{summary_line(progress)}: {ended_line(run, outcome)}")


class LiveGrid:
    """Show a panel with the whole grid and the active runs.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"),
            console=console, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("comparing", total=1.0)
        self._rows: list[tuple[str, ...]] = []
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveGrid:
        with suppress(OSError):
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._live.stop()

    def show(self, progress: GridProgress) -> None:
        """Update the panel."""
        self._bar.update(self._task, completed=progress.fraction, description=summary_line(progress))
        self._rows = [
            (folder, "starting" if found is None else f"{found.fraction:.0%}",
             "" if found is None or found.loss is None else f"loss {found.loss:.4f}")
            for folder, found in progress.running.items()
        ]  # fmt: skip

    def ended(self, run: PlannedRun, outcome: Outcome | None, progress: GridProgress) -> None:
        """Print a line above the panel."""
        self.show(progress)
        with suppress(OSError):
            self._console.print(Text(visible(ended_line(run, outcome))))

    def _panel(self) -> Group:
        table = Table.grid(padding=(0, 3))
        for row in self._rows:
            table.add_row(*map(Text, row))
        return Group(self._bar, table)


def summary_line(progress: GridProgress) -> str:
    """Return how many runs have ended, how many of them badly, and the time that is left."""
    bad = [
        f"{count} {what}"
        for count, what in ((progress.num_diverged, "diverged"), (progress.num_failed, "failed"))
        if count
    ]
    words = f"{progress.num_ended} of {progress.num_runs} runs" + (f" ({', '.join(bad)})" if bad else "")
    return words if progress.num_ended == progress.num_runs else f"{words}, left {duration(progress.left_s())}"


def ended_line(run: PlannedRun, outcome: Outcome | None) -> str:
    """Return a run and how it ended."""
    if outcome is None:
        return f"{run.folder} stopped"
    return f"{run.folder} {outcome.state}" + (f": {outcome.reason}" if outcome.reason else "")


def _print(line: str) -> None:
    with suppress(OSError):
        print(visible(line), file=sys.stderr, flush=True)
