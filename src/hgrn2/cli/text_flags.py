"""Flags of `hgrn2 train` that only tasks on text accept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hgrn2.errors import UserError
from hgrn2.tasks import find_task
from hgrn2.tasks.registry import option_names


def split_data_flags(
    name: str | None, flags: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn --data and --validation into options of a task that has such options.

    Args:
        name: name of the task.
        flags: values of the flags of text.
        options: options of the task.

    Returns:
        The remaining flags, and the options.

    Raises:
        UserError: one of the flags names several paths.
    """
    flags, options = dict(flags), dict(options)
    if name is None or (task := find_task(name)).reads_text:
        return flags, options
    for key in ("data", "validation"):
        values = flags[key]
        if not values or key not in option_names(task):
            continue
        if len(values) > 1:
            raise UserError(f"--{key}: task {name!r} takes one path; found {', '.join(values)}")
        options[key] = values[0]
        flags[key] = ()
    return flags, options


def refuse_text_flags(task: str, flags: Mapping[str, Any]) -> None:
    """Raise a UserError if one of the flags is given.

    Args:
        task: name of a task that reads no text.
        flags: values of the flags, by name.
    """
    if named := [f"--{name}" for name, value in flags.items() if value]:
        raise UserError(f"task {task!r} reads no text; drop {' and '.join(named)}", "contradiction")
