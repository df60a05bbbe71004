"""`hgrn2 plot`: write a run's report and plots again."""

from __future__ import annotations

from pathlib import Path

import tyro

from hgrn2.cli.command import Command


def plot(run: tyro.conf.Positional[Path]) -> None:
    """Write a run's report and plots again.

    They show loss, samples, gates, speed and settings; the run may still be training.

    Args:
        run: A run folder.
    """
    from hgrn2.cli.output import tell
    from hgrn2.extras import install_command
    from hgrn2.train.report import write_report

    print(write_report(run))
    try:
        from hgrn2.train.plots import plot_run
    except ImportError as error:
        tell(f"no plots besides the report: {error.name} is not installed: {install_command('train')}")
        return
    for path in plot_run(run):
        print(path)


COMMAND = Command("plot", plot, order=60, aliases=("draw", "plots", "graph"))
