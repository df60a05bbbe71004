"""Parsing with tyro: plain names of types, and errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hgrn2.errors import UserError

_types = ConstructorRegistry()

# several words after one flag
Texts = tuple[str, ...]

_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _flags_of(function: Callable[..., Any]) -> list[str]:
    found: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.default):
            found += [field.name for field in dataclasses.fields(parameter.default)]
        elif "Positional" not in str(parameter.annotation):
            # a flag may be called as a word of Python's is
            found.append(parameter.name.removesuffix("_"))
    return [f"--{name.replace('_', '-')}" for name in found]


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


def parse(argv: Sequence[str], commands: dict[str, Callable[..., int | None]]) -> functools.partial[int | None]:
    """Return the call that the command line asks for.

    Args:
        argv: the words after `hgrn2`.
        commands: the functions that carry them out, by name.

    Raises:
        UserError: a word is not understood.
    """
    app = tyro.extras.SubcommandApp()
    for name, function in commands.items():
        app.command(name=name)(_deferred(function))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            call = app.cli(
                prog="hgrn2", description="Gated linear RNN language models with state expansion.", registry=_types,
                args=argv,
            )  # fmt: skip
    except SystemExit as stop:
        # help, or a signal
        if stop.code != 2:
            raise
    else:
        return functools.partial(call.func, *call.args, **{k: _with_given(v, argv) for k, v in call.keywords.items()})
    # the parser prints a title and what is wrong, then a rule and hints; in a box where the terminal can show one
    _, *rows = (row.strip("│ ") for row in printed.getvalue().splitlines())
    is_rule = [row.startswith(("───", "---")) and not row.strip("─-") for row in rows]
    first = is_rule.index(False)
    last = is_rule.index(True, first) if True in is_rule[first:] else len(rows)
    text = " ".join(" ".join(rows[first:last]).split())
    name = next((word for word in argv[:1] if word in commands), None)
    raise UserError(f"{text}; {_near(text, name, commands)}see {' '.join(filter(None, ['hgrn2', name, '--help']))}")


def _deferred(function: Callable[..., int | None]) -> Callable[..., Any]:
    """Return a function that only prepares the call, so that what parsing prints can be told apart."""

    @functools.wraps(function)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    return prepare


def _with_given(value: Any, argv: Sequence[str]) -> Any:
    """Fill in which fields of a dataclass of flags were named, so that the others leave files alone."""
    if not hasattr(value, "given"):
        return value
    words = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    words |= {word.removeprefix("no_") for word in words}
    given = tuple(field.name for field in dataclasses.fields(value) if field.name in words)
    return dataclasses.replace(value, given=given)


def _near(text: str, name: str | None, commands: dict[str, Callable[..., int | None]]) -> str:
    """A question about the flags, or the command, nearest to what was not recognized."""
    what, _, words = text.partition(": ")
    if not what.startswith("Unrecognized"):
        return ""
    # flags of this command alone, to which the parser's own hints do not keep
    known = _flags_of(commands[name]) if name else list(commands)
    unknown = [word for word in re.findall(r"[^\s,=]+", words) if word.startswith("--") or not name]
    near = [found for word in unknown for found in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]
    return f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
