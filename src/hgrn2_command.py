"""Entry point of the command `hgrn2`, outside the package so that it runs before torch is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# if any of these is set, the user has chosen
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def sleep_while_waiting() -> None:
    """Make OpenMP threads sleep while they wait for work; call it before torch is imported.

    By default they spin, which takes the cores away from other processes: two small training runs on two cores
    then take fifty times as long as one. The environment is left alone if it holds a choice already.
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        # OpenMP reads it once, when its library is loaded
        os.environ["OMP_WAIT_POLICY"] = "passive"


def main() -> int:
    """Import the command line and run it.

    Returns:
        The exit status, see `hgrn2.cli.main`.
    """
    sleep_while_waiting()
    waiting = signal.getsignal(signal.SIGINT)
    # what is imported may print a traceback for Ctrl-C, or swallow it; there is nothing to tidy up yet
    if waiting is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from hgrn2 import cli
    except ModuleNotFoundError as missing:
        return _refuse_without(missing)

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
    finally:
        _restore_default_signals()


def _refuse_without(missing: ModuleNotFoundError) -> int:
    """Say how to install a package that the command line needs; returns the exit status."""
    if missing.name is None or missing.name.partition(".")[0] == "hgrn2":
        raise missing
    from hgrn2.extras import install_command

    print(f"error: the command line needs {missing.name}: {install_command('train')}", file=sys.stderr)
    return 2


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _restore_default_signals() -> None:
    """Let further signals end the process at once: the work is done, and a handler would only print a traceback."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # ignored signals, as under nohup, stay ignored
        if number is not None and signal.getsignal(number) in (_end, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL)
