"""`hgrn2 task`: show synthetic tasks and those of Long Range Arena, and samples of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import tyro
from rich.markup import escape
from rich.table import Table

from hgrn2.cli.command import Command
from hgrn2.cli.key_values import parse_key_values
from hgrn2.cli.output import show_table
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError
from hgrn2.tasks import GENERATORS, TASKS, SyntheticOptions, find_task, generate, show
from hgrn2.tasks.generators import find_generator
from hgrn2.tasks.registry import make_options


def task(
    name: tyro.conf.Positional[str | None] = None,
    samples: int = 3,
    seed: int = 0,
    start: int = 0,
    task_set: Texts = (),
    set: Texts = (),
) -> None:
    """Show a task, its distribution and options, and samples of it.

    These are the synthetic tasks and those of Long Range Arena. In a sample of a synthetic task, the line below the
    tokens holds the targets, with "." where none counts. Samples of images are written to NAME.png in the current
    folder.

    Args:
        name: A task; without one, all are listed.
        samples: Examples to show.
        seed: Seed of the examples of a generator; a run with this seed trains on them in this order.
        start: Index of the first example.
        task_set: Options of the task as KEY=VALUE, as for hgrn2 train.
        set: The former name of --task-set.
    """
    for flag, value in (("--samples", samples), ("--start", start)):
        if value < 0:
            raise UserError(f"{flag} is {value}; wanted 0 or more")
    task_set += set
    if name is None:
        if task_set:
            raise UserError("--task-set changes a task; name one before it", "incomplete")
        show_table(_tasks())
        return
    # also finds tasks of installed packages
    found = find_task(name)
    if hasattr(found, "show_samples"):
        if seed:
            raise UserError(
                f"--seed is {seed}; the samples of {name} are its held-out examples, leave --seed out", "unsupported"
            )
        _show_sequences(found, samples, start, task_set)
        return
    if name not in GENERATORS:
        able = sorted({*GENERATORS, *(key for key, task in TASKS.items() if hasattr(task, "show_samples"))})
        raise UserError(
            f"task {name!r} has no generator, its examples are those of your data; wanted one of {', '.join(able)}",
            "unsupported",
        )
    kind = find_generator(name)
    options = make_options(found, parse_key_values(task_set, "--task-set", "an option of the task"))
    examples = generate(options, samples, seed, start=start)
    print(inspect.getdoc(kind) or "")
    print()
    shared = {field.name for field in dataclasses.fields(SyntheticOptions)} - {"length"}
    table = _options(name, options, shared)
    table.add_row("", "", f"{options.vocab_size:,} tokens in the vocabulary")
    show_table(table)
    if samples:
        print()
        print(show(options, examples))


def _show_sequences(found: Any, samples: int, start: int, task_set: Sequence[str]) -> None:
    """Show a task whose examples are read or drawn as sequences."""
    options = make_options(found, parse_key_values(task_set, "--task-set", "an option of the task"))
    print(inspect.getdoc(found) or "")
    print()
    show_table(_options(found.name, options, ()))
    if samples:
        print()
        print(found.show_samples(options, samples, start, Path()))


def _tasks() -> Table:
    table = Table("task", "what a model learns", title="synthetic tasks: hgrn2 train --task NAME")
    for name, kind in GENERATORS.items():
        table.add_row(name, escape(_summary(kind)))
    for name, kind in TASKS.items():
        if hasattr(kind, "show_samples"):
            table.add_row(name, escape(_summary(kind)))
    return table


def _summary(kind: type[Any]) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _options(name: str, options: Any, shared: Collection[str]) -> Table:
    """Return the options of a task; those in `shared`, which every task has, come last."""
    texts: dict[str, str] = {}
    for kind in reversed(type(options).__mro__[:-1]):
        documented = docstring_parser.parse_from_object(kind)
        texts |= {p.arg_name: " ".join((p.description or "").split()) for p in documented.params}
    table = Table("option", "value", "", title=f"{name}: --task-set OPTION=VALUE")
    table.columns[1].justify = "right"
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name in shared):
        value = getattr(options, field.name)
        shown = str(list(value)) if isinstance(value, tuple) else str(value)
        table.add_row(field.name, escape(shown), escape(texts.get(field.name, "")))
    return table


COMMAND = Command("task", task, order=45, aliases=("tasks", "sample", "samples", "synthetic"))
