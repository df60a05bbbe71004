"""Entry point of the command `hgrn2`, outside the package so that it runs before torch is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# if any of these is set, the choice is the user's
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def sleep_while_waiting() -> None:
    """Make OpenMP threads sleep while they wait for work; call it before torch is imported.

    By default they spin, which takes the cores away from other processes: two small training runs on two cores
    then take fifty times as long as one. The environment stays unchanged if one of the variables is set.
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        # OpenMP reads it once, when its library is loaded
        os.environ["OMP_WAIT_POLICY"] = "passive"


def main() -> int:
    """Import the command line and run it.

    Returns:
        The exit status of `hgrn2.cli.main`; 130 after Ctrl-C.
    """
    sleep_while_waiting()
    waiting = signal.getsignal(signal.SIGINT)
    # during imports, Ctrl-C may print a traceback or be swallowed; there is nothing to clean up yet
    if waiting is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from hgrn2 import cli
    except ModuleNotFoundError as missing:
        return _refuse_without(missing)

    # unless handled otherwise, these signals end a command with cleanup, too
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
    """Print how to install a package that the command line needs, and return the exit status."""
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
