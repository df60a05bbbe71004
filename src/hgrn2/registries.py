"""Checks shared by the registries of mixers, backends, tasks and commands; entries that installed packages bring."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable
from typing import Any

from hgrn2.errors import UserError, unknown_key_message

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def check_name(kind: str, name: Any) -> str:
    """Return the name of a new entry of a registry.

    Args:
        kind: kind of entry, e.g. "mixer".
        name: the name.

    Raises:
        UserError: it is not a word of letters, digits, "-" and "_" that starts with a letter or "_".

    Example:
        >>> check_name("mixer", "rwkv-6")
        'rwkv-6'
    """
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise UserError(
            f"{kind} {name!r}: wanted a name that is a word of letters, digits, - and _, starting with a letter or _"
        )
    return name


def has_own_fields(options: Any, base: type) -> bool:
    """Return whether options are a class decorated with @dataclass(frozen=True) and derived from a base class.

    A subclass without the decorator would lose its own fields.

    Args:
        options: the class.
        base: the base class.
    """
    is_class = isinstance(options, type) and issubclass(options, base) and "__dataclass_fields__" in vars(options)
    return is_class and options.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]


def entry_names(group: str) -> list[str]:
    """Return the names of the entry points of a group, imported or not."""
    return list(importlib.metadata.entry_points(group=group).names)


def load_entry(entry: importlib.metadata.EntryPoint, kind: str) -> Any:
    """Import an entry point of an installed package.

    Args:
        entry: the entry point.
        kind: kind of entry, e.g. "mixer".

    Raises:
        UserError: its module is missing, or raises an error ("unavailable"); its own UserErrors keep their code.
    """
    try:
        return entry.load()
    # code of other packages may raise anything
    except Exception as error:
        code = error.code if isinstance(error, UserError) else "unavailable"
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{_described(entry, kind)} cannot be imported ({reason}); repair or uninstall it", code
        ) from error


def load_entries(group: str, name: str, kind: str, registered: Collection[str]) -> None:
    """Import the modules of the entry points with a name, which register it; do nothing if there are none.

    Args:
        group: the group of the entry points, e.g. "hgrn2.mixers".
        name: name of the entry.
        kind: kind of entry, e.g. "mixer".
        registered: names in the registry, as they are after the import.

    Raises:
        UserError: a module cannot be imported, or does not register the name ("incomplete").
    """
    for entry in importlib.metadata.entry_points(group=group, name=name):
        load_entry(entry, kind)
        if name not in registered:
            raise UserError(
                f"{_described(entry, kind)} registers no {kind} {name!r}; register it, or correct the entry point",
                "incomplete",
            )


def unknown_entry(what: str, name: Any, kind: str, known: Iterable[str], group: str) -> UserError:
    """Return the error about a name that no registry has; it suggests similar names, also those not imported yet.

    Args:
        what: where the name was found.
        name: the name.
        kind: kind of entry, e.g. "mixer".
        known: names in the registry.
        group: the group of entry points of installed packages.
    """
    message = unknown_key_message(what, name, {*known, *entry_names(group)}, kind)
    joint = " If" if message.endswith("?") else "; if"
    return UserError(f"{message}{joint} a package brings it, install that", "unknown-name")


def _described(entry: importlib.metadata.EntryPoint, kind: str) -> str:
    package = "" if entry.dist is None else f" of package {entry.dist.name} {entry.dist.version}"
    return f"{kind} {entry.name!r}: the entry point {entry.value!r}{package}"
