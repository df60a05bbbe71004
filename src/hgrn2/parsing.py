"""How the command line is read: tyro, with names of types that people know and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hgrn2.errors import UserError

_app = tyro.extras.SubcommandApp()
_types = ConstructorRegistry()
_flags: dict[str, list[str]] = {}

_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def command(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Registers a command; parsing only prepares the call, so that what parsing prints can be told apart."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        @functools.wraps(function)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            return functools.partial(function, *args, **kwargs)

        _app.command(name=name)(prepare)
        _flags[name] = [f"--{flag.replace('_', '-')}" for flag in _flags_of(function)]
        return function

    return register


def _flags_of(function: Callable[..., Any]) -> list[str]:
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.default):
            found += [field.name for field in dataclasses.fields(parameter.default)]
        elif "Positional" not in str(parameter.annotation):
            # a flag may be called as a word of Python's is
            found.append(parameter.name.removesuffix("_"))
    return found


@_types.primitive_rule
def _plain_type(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, texts and paths; "None" unsets those that may be unset, which the help need not say of each."""
    is_union = typing.get_origin(type_info.type) in (types.UnionType, typing.Union)
    kinds = typing.get_args(type_info.type) if is_union else (type_info.type,)
    optional = types.NoneType in kinds
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    if len(kinds) != 1 or kinds[0] not in _NAMES:
        return None
    kind = kinds[0]

    def convert(words: list[str]) -> Any:
        if optional and words == ["None"]:
            return None
        # Path("") is the current folder, which nobody means by it
        if kind is Path and not words[0]:
            raise ValueError("'' is not a path")
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {_NAMES[kind]}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=convert,
        is_instance=lambda value: (optional and value is None) or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def parse() -> Callable[[], int | None]:
    """The call that the command line asks for.

    Raises:
        UserError: it asks for nothing there is.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return _app.cli(
                prog="hgrn2", description="Gated linear RNN language models with state expansion.", registry=_types
            )
    except SystemExit as stop:
        # help, or a signal
        if stop.code != 2:
            raise
    # the parser prints a title and what is wrong, then a rule and hints; in a box where the terminal can show one
    _, *rows = (row.strip("│ ") for row in printed.getvalue().splitlines())
    is_rule = [row.startswith(("───", "---")) and not row.strip("─-") for row in rows]
    first = is_rule.index(False)
    last = is_rule.index(True, first) if True in is_rule[first:] else len(rows)
    text = " ".join(" ".join(rows[first:last]).split())
    name = next((word for word in sys.argv[1:2] if word in _flags), None)
    raise UserError(f"{text}; {_near(text, name)}see {' '.join(filter(None, ['hgrn2', name, '--help']))}")


def _near(text: str, name: str | None) -> str:
    """A question about the flags, or the command, nearest to what was not recognized."""
    what, _, words = text.partition(": ")
    if not what.startswith("Unrecognized"):
        return ""
    # flags of this command alone, to which the parser's own hints do not keep
    known = _flags[name] if name else list(_flags)
    unknown = [word for word in re.findall(r"[^\s,=]+", words) if word.startswith("--") or not name]
    near = [found for word in unknown for found in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]
    return f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
