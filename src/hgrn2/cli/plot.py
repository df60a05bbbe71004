"""`hgrn2 plot`: draw a run's pictures again."""

from __future__ import annotations

from pathlib import Path

import tyro


def plot(run: tyro.conf.Positional[Path]) -> None:
    """Draw a run's pictures again.

    They show loss, lower bounds, forget gates, memory and the norm of the state.

    Args:
        run: A run folder.
    """
    from hgrn2.train.plots import plot_run

    for path in plot_run(run):
        print(path)
