"""Where the command `hgrn2` starts. Beside the package, for importing anything in that takes seconds for torch."""

from __future__ import annotations

import signal
import sys
from types import FrameType


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

    # unless somebody has other plans for them, these too end a command so that it tidies up
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        signal.signal(signal.SIGINT, waiting)
        return cli.main()
    except KeyboardInterrupt:
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)
