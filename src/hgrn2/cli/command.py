"""Commands of `hgrn2`: a module of this package each, with a `Command` named COMMAND in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from hgrn2.errors import UserError

# the functions' own signatures differ
Function = Callable[..., int | None]


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        name: word after `hgrn2`.
        function: carries it out and returns the exit status, None for 0. Its signature and docstring are the flags and
            the help.
        order: place in the help; smaller first.
        common: parameters or fields that the short help shows; empty: all.
        aliases: words that people type instead of the name.
        needs_output: whether a reader that closes the pipe before the command is done is an error.
    """

    name: str
    function: Function
    order: int = 100
    common: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    needs_output: bool = False


COMMANDS: dict[str, Command] = {}


def register_command(command: Command) -> None:
    """Add a command to the command line.

    Raises:
        UserError: the name is taken, or the function has no docstring, from which the help is made.
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
