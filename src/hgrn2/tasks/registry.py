"""Register tasks, and find them by name."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, TypeVar

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.registries import check_name, has_own_fields, load_entries, unknown_entry
from hgrn2.tasks.base import Metric, Task, TaskReport
from hgrn2.tasks.options import TaskOptions

# group of entry points of installed packages
ENTRY_POINTS = "hgrn2.tasks"
TASKS: dict[str, type[Any]] = {}

T = TypeVar("T", bound=type)

_METHODS = [name for name, part in vars(Task).items() if not name.startswith("_") and not isinstance(part, property)]
_PARTS = [*Task.__annotations__, *_METHODS, "carries_state"]


def register_task(task: T) -> T:
    """Add a task, a class with every part of the protocol `Task`; use it as a decorator.

    Returns:
        The class.

    Raises:
        UserError: the name is taken or not a word, or a part is missing or of another type.
    """
    if not isinstance(task, type):
        raise UserError(f"task {task!r}: wanted a class; see hgrn2.tasks.base.Task")
    name = getattr(task, "name", None)
    what = f"task {name!r}" if isinstance(name, str) else f"task {task.__name__}"
    if missing := [part for part in _PARTS if not hasattr(task, part)]:
        raise UserError(f"{what}: lacks {', '.join(missing)}; see hgrn2.tasks.base.Task", "incomplete")
    name = check_name("task", name)
    if not has_own_fields(task.Options, TaskOptions):
        raise UserError(
            f"{what}: Options is {task.Options!r}; wanted a class with @dataclass(frozen=True) and base TaskOptions",
            "incomplete",
        )
    for part, kind in (("metric", Metric), ("report", TaskReport), ("reads_text", bool)):
        if not isinstance(getattr(task, part), kind):
            raise UserError(f"{what}: {part} is {getattr(task, part)!r}; wanted a {kind.__name__}", "incomplete")
    for part in _METHODS:
        if not callable(getattr(task, part)):
            raise UserError(f"{what}: {part} is {getattr(task, part)!r}; wanted a method", "incomplete")
    if name in TASKS:
        raise UserError(
            f"{what}: registered already, by {TASKS[name].__qualname__}; choose another name", "already-exists"
        )
    TASKS[name] = task
    return task


def load_tasks() -> None:
    """Register the tasks of the package; the order of their modules is that of the help."""
    for module in ("language", "distillation", "synthetic", "image", "lra"):
        importlib.import_module(f"hgrn2.tasks.{module}")


def find_task(name: str) -> type[Any]:
    """Return the task with a name.

    An installed package provides tasks through the entry point group "hgrn2.tasks": the name of the task, and the
    module that registers it. The module is imported when the name is first used.

    Raises:
        UserError: no task has this name (the message names near matches), or the package that brings it cannot be
            imported.
    """
    load_tasks()
    if isinstance(name, str) and name not in TASKS:
        load_entries(ENTRY_POINTS, name, "task", TASKS)
    # a name of another type may have no hash
    if not isinstance(name, str) or name not in TASKS:
        raise unknown_entry("task", name, "task", TASKS, ENTRY_POINTS)
    return TASKS[name]


def option_names(task: type[Any]) -> list[str]:
    """Return the names of a task's options."""
    return [field.name for field in dataclasses.fields(task.Options)]


def make_options(task: type[Any], values: dict[str, Any]) -> Any:
    """Return a task's options with these values, and defaults for the rest.

    Raises:
        UserError: no option of this task has this name (near names, and the task it belongs to, are named), one that
            has no default is missing, or a value is out of range.
    """
    known = option_names(task)
    for key in values:
        if key not in known:
            raise UserError(unknown_option(task, key), "unknown-name")
    required = [field.name for field in dataclasses.fields(task.Options) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"task {task.name!r}: {' and '.join(missing)} is missing; name it", "incomplete")
    return task.Options(**values)


def unknown_option(task: type[Any], key: str, further: tuple[str, ...] = ()) -> str:
    """Return a message about an unknown option: near matches, or the task that has it.

    Args:
        task: the task.
        key: the key that was found.
        further: other valid keys in that place.
    """
    owners = [name for name, other in TASKS.items() if key in option_names(other)]
    if owners:
        own = ", ".join(option_names(task)) or "none"
        return f"task {task.name!r}: {key!r} is an option of task {' and '.join(map(repr, owners))}; its own are {own}"
    what = task.Options.what if further else f"task {task.name!r}"
    return unknown_key_message(what, key, [*option_names(task), *further], "key" if further else "option")
