"""The command line `hgrn2`, with one module per command."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence

from hgrn2.cli.command import ARGUMENTS, COMMANDS, Command, register_command, register_installed
from hgrn2.cli.output import refuse, release_output, tell
from hgrn2.cli.parsing import parse
from hgrn2.errors import UserError

__all__ = ["COMMANDS", "Command", "main", "register_command"]

# a new command is a new module
for _module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
    _command = getattr(importlib.import_module(f"{__name__}.{_module}"), "COMMAND", None)
    if isinstance(_command, Command):
        register_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `hgrn2`; those of the process if None.

    Returns:
        The exit status: 2 for errors that the user can fix; 128 + the signal number after a signal.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    ARGUMENTS.set(argv)
    warnings.showwarning = lambda message, *_args, **_kwargs: tell(f"warning: {message}")
    # None if closed by >&- or 2>&-
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # replace characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    call = status = None
    try:
        try:
            if not argv or argv[0] not in COMMANDS:
                # the help and completion name all commands
                register_installed(None if not argv or argv[0].startswith("-") else argv[0])
            call = parse(argv, COMMANDS)
            status = call() or 0
        except SystemExit:
            # after printing help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except UserError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        needs_output = any(
            command.needs_output for command in COMMANDS.values() if command.function is getattr(call, "func", None)
        )
        if isinstance(error, BrokenPipeError) and (status is not None or not needs_output):
            # the reader closed the pipe, as in `hgrn2 generate ... | head`; an error only for an unfinished run
            release_output()
            return status or 0
        if error.filename is not None:
            # a file or folder that cannot be read or written
            return refuse(f"{error.filename}: {error.strerror}; name another path, or fix this one")
        if error.strerror is None:
            raise
        return refuse(f"{error.strerror}; check free space and the output destination")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f" ({first[0].strip()})" if (first := str(error).splitlines()) else ""
        return refuse(f"out of memory{reason}; lower batch_size or seq_len, or take a smaller model")


def _is_out_of_memory(error: Exception) -> bool:
    # on a CPU torch raises a plain RuntimeError, on a GPU errors with several texts
    words = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
