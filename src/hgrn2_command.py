"""Where the command `hgrn2` starts. Beside the package, for importing anything in that takes seconds for torch."""

from __future__ import annotations

import signal


def main() -> int:
    """Imports the command line and runs it.

    Returns:
        The exit status, see `hgrn2.cli.main`.
    """
    waiting = signal.getsignal(signal.SIGINT)
    # what is imported may print a traceback for Ctrl-C, or swallow it; there is nothing to tidy up yet
    if waiting is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hgrn2 import cli

    try:
        signal.signal(signal.SIGINT, waiting)
        return cli.main()
    except KeyboardInterrupt:
        return 130
