"""Register commands. Each module of this package that defines COMMAND is a command of `hgrn2`."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from hgrn2.errors import UserError

# the functions' own signatures differ
Function = Callable[..., int | None]


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: the word after `hgrn2`.
        function: runs the command and returns the exit status (None means 0). Its signature and docstring define the
            flags and the help.
        order: position in the help; smaller first.
        common: parameters or fields shown by the short help; empty means all.
        aliases: words that users may type instead of the name, for suggestions.
        needs_output: whether a pipe that the reader closes early is an error.
    """

    name: str
    function: Function
    order: int = 100
    common: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    needs_output: bool = False


# group of entry points of installed packages
ENTRY_POINTS = "hgrn2.commands"
COMMANDS: dict[str, Command] = {}


def register_command(command: Command) -> None:
    """Add a command to the command line.

    Raises:
        UserError: the name is taken, or the function has no docstring to make the help from.
    """
    name = command.name
    if name in COMMANDS:
        other = COMMANDS[name].function
        raise UserError(
            f"command {name!r}: registered already, by {other.__module__}.{other.__qualname__}; choose another name",
            "already-exists",
        )
    if not inspect.getdoc(command.function):
        raise UserError(f"command {name!r}: its function has no docstring; write the help there", "incomplete")
    COMMANDS[name] = command
    in_order = sorted(COMMANDS.items(), key=lambda item: item[1].order)
    COMMANDS.clear()
    COMMANDS.update(in_order)


def register_installed(name: str | None = None) -> None:
    """Add the commands of installed packages, from entry points of the group "hgrn2.commands", each a `Command`.

    Args:
        name: only the command of this name; None adds all.
    """
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for entry in found if name is None else found.select(name=name):
        if entry.name not in COMMANDS:
            register_command(entry.load())
