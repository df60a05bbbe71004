"""Register commands. Each module of this package that defines COMMAND is a command of `hgrn2`."""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from hgrn2.errors import UserError
from hgrn2.registries import check_name, entry_names, load_entry

# the functions' own signatures differ
Function = Callable[..., int | None]
# the words after `hgrn2`, for a command that starts itself in several processes
ARGUMENTS: ContextVar[Sequence[str]] = ContextVar("arguments", default=())


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
        UserError: the name is taken or not a word, a field is of another type or names what does not exist, or the
            function has no docstring to make the help from, or a parameter that cannot be a flag.
    """
    # it reads functions of this type
    from hgrn2.cli.flags import flags_of

    if not isinstance(command, Command):
        raise UserError(f"command {command!r}: wanted a Command(name, function)")
    name = check_name("command", command.name)
    if name in COMMANDS:
        other = COMMANDS[name].function
        raise UserError(
            f"command {name!r}: registered already, by {other.__module__}.{other.__qualname__}; choose another name",
            "already-exists",
        )
    if not inspect.isroutine(command.function):
        raise UserError(f"command {name!r}: function is {command.function!r}; wanted a function")
    if not inspect.getdoc(command.function):
        raise UserError(f"command {name!r}: its function has no docstring; write the help there", "incomplete")
    _check_fields(command)
    fields = [flag.field for flag in flags_of(command.function)]
    if unknown := [field for field in command.common if field not in fields]:
        raise UserError(
            f"command {name!r}: common holds {', '.join(unknown)}; its parameters are {', '.join(fields) or 'none'}",
            "unknown-name",
        )
    COMMANDS[name] = command
    in_order = sorted(COMMANDS.items(), key=lambda item: item[1].order)
    COMMANDS.clear()
    COMMANDS.update(in_order)


def _check_fields(command: Command) -> None:
    name = command.name
    for field in ("common", "aliases"):
        words: Any = getattr(command, field)
        if not isinstance(words, tuple | list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"command {name!r}: {field} is {words!r}; wanted a tuple of words")
    if isinstance(command.order, bool) or not isinstance(command.order, int | float):
        raise UserError(f"command {name!r}: order is {command.order!r}; wanted a number")
    if taken := [word for word in command.aliases if word in COMMANDS]:
        raise UserError(f"command {name!r}: its alias {taken[0]!r} is a command; leave it out", "already-exists")


def register_installed(name: str | None = None) -> None:
    """Add the commands of installed packages, from entry points of the group "hgrn2.commands", each a `Command`.

    Args:
        name: only the command of this name; None adds all, with a warning about those that cannot be added.

    Raises:
        UserError: the command of this name cannot be added.
    """
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for entry in found if name is None else found.select(name=name):
        if entry.name in COMMANDS:
            continue
        try:
            command = load_entry(entry, "command")
            if not isinstance(command, Command) or command.name != entry.name:
                raise UserError(
                    f"command {entry.name!r}: the entry point {entry.value!r} is {command!r}; wanted a Command of this "
                    "name",
                    "incomplete",
                )
            register_command(command)
        except UserError as error:
            if name is not None:
                raise
            # the other commands still work
            warnings.warn(str(error), UserWarning, stacklevel=2)


def known_commands() -> list[str]:
    """Return the names of all commands, also those of installed packages that are not imported yet."""
    return list(dict.fromkeys([*COMMANDS, *entry_names(ENTRY_POINTS)]))
