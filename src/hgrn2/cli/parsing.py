"""Parse the command line with tyro: plain type names, one-line errors, suggestions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import hgrn2
from hgrn2.cli import help, hints
from hgrn2.cli.command import Command, Function
from hgrn2.cli.flags import flags_of
from hgrn2.errors import UserError

_types = ConstructorRegistry()

# several words after one flag
Texts = tuple[str, ...]

_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_SHELLS = ("bash", "zsh", "fish")


@_types.primitive_rule
def _plain_type(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return the parser of numbers, texts, paths and choices; "None" unsets optional ones."""
    is_union = typing.get_origin(type_info.type) in (types.UnionType, typing.Union)
    kinds = typing.get_args(type_info.type) if is_union else (type_info.type,)
    optional = types.NoneType in kinds
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    choices = tuple(sorted(typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else None
    if choices is None and kind not in _NAMES:
        return None

    def convert(words: list[str]) -> Any:
        (word,) = words
        if choices is not None:
            return word
        if optional and word == "None":
            return None
        # an empty word must not mean the current folder, as Path("") does
        if kind is Path and not word:
            raise ValueError("'' is not a path")
        try:
            return kind(word)
        except ValueError:
            raise ValueError(f"{word!r} is not {_NAMES[kind]}") from None

    def is_instance(value: Any) -> bool:
        return (optional and value is None) or (value in choices if choices else isinstance(value, kind))

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(choices) if choices else kind.__name__.upper(),
        instance_from_str=convert,
        is_instance=is_instance,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def parse(argv: Sequence[str], commands: Mapping[str, Command]) -> functools.partial[Any]:
    """Return the call that the command line asks for.

    Args:
        argv: the words after `hgrn2`.
        commands: the commands by name.

    Raises:
        UserError: a word is not understood.
    """
    name, *words = argv or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        return functools.partial(print, help.overview(commands))
    if name == "--version":
        return functools.partial(print, f"hgrn2 {hgrn2.__version__}")
    if name == "--print-completion":
        return functools.partial(print, _completion_script(words, commands))
    if name not in commands:
        raise UserError(f"{hints.unknown_command(name, commands)}see hgrn2 --help", "unknown-name")
    function = commands[name].function
    flags = words[: words.index("--")] if "--" in words else words
    if asked := {"-h", "--help", "--help-all"}.intersection(flags):
        text = help.command_help(commands[name], all_flags="--help-all" in asked)
        return functools.partial(print, text)
    if empty := _without_words(flags, function):
        raise UserError(f"{empty}: its value is missing; see hgrn2 {name} --help")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            call = tyro.cli(_deferred(function), prog=f"hgrn2 {name}", registry=_types, args=words)
    except SystemExit as stop:
        # or a signal
        if stop.code != 2:
            raise
    else:
        return functools.partial(call.func, *call.args, **_with_given(call, function, name, words))
    said = hints.explain(_first_message(printed.getvalue()), name, flags_of(function))
    raise UserError(f"{said}{' ' if said.endswith('?') else '; '}see hgrn2 {name} --help")


def _without_words(words: Sequence[str], function: Function) -> str | None:
    """Return the first flag of several words that no word follows, which the parser would take as none given."""
    several = {flag.name for flag in flags_of(function) if flag.takes_several}
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.replace("_", "-") in several and following.startswith("--"):
            return word
    return None


def _first_message(printed: str) -> str:
    """Extract the message from the box that the parser prints, with a title above and hints below."""
    _, *rows = (row.strip("│ ") for row in printed.splitlines())
    is_rule = [row.startswith(("───", "---")) and not row.strip("─-") for row in rows]
    first = is_rule.index(False)
    last = is_rule.index(True, first) if True in is_rule[first:] else len(rows)
    return " ".join(" ".join(rows[first:last]).split())


def _deferred(function: Function, change_default: Callable[[Any], Any] = lambda default: default) -> Any:
    """Return a function that only prepares the call, so that output of parsing is not mixed with the command's.

    Args:
        function: carries out a command.
        change_default: maps each default of its signature to another.
    """

    @functools.wraps(function)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(default=change_default(p.default)) for p in signature.parameters.values()]
    vars(prepare)["__signature__"] = signature.replace(parameters=parameters)
    return prepare


def _with_given(call: functools.partial[Any], function: Function, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call, with the named fields of every dataclass of flags filled into its `given`.

    The words are parsed again with every default changed: a field that is the same both times was named.
    """
    found = dict(call.keywords)
    grouped = [key for key, value in found.items() if hasattr(value, "given")]
    if grouped:
        again = tyro.cli(_deferred(function, _changed_defaults), prog=f"hgrn2 {name}", registry=_types, args=words)
        for key in grouped:
            one, other = found[key], again.keywords[key]
            names = [field.name for field in dataclasses.fields(one) if field.name != "given"]
            # as texts: NaN is not equal to itself
            given = tuple(name for name in names if repr(getattr(one, name)) == repr(getattr(other, name)))
            found[key] = dataclasses.replace(one, given=given)
    return found


def _changed_defaults(default: Any) -> Any:
    """Return a dataclass of flags with another value of the right type in every field; other defaults as they are."""
    if not hasattr(default, "given"):
        return default
    hints = typing.get_type_hints(type(default))
    names = [field.name for field in dataclasses.fields(default) if field.name != "given"]
    return dataclasses.replace(default, **{name: _other_value(hints[name], getattr(default, name)) for name in names})


def _other_value(hint: Any, value: Any) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if kind is bool:
        return not value
    if kind in (int, float):
        return kind(0 if value is None else value + 1)
    return kind("x" if value is None else f"{value}x")


def _completion_script(words: Sequence[str], commands: Mapping[str, Command]) -> str:
    if len(words) != 1 or words[0] not in _SHELLS:
        raise UserError(f"--print-completion {' '.join(words)}: wanted {', '.join(_SHELLS[:-1])} or {_SHELLS[-1]}")
    app = tyro.extras.SubcommandApp()
    for name, command in commands.items():
        app.command(name=name)(_deferred(command.function))
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        app.cli(prog="hgrn2", registry=_types, args=["--tyro-print-completion", words[0]])
    # complete file names by default
    return script.getvalue().rstrip().replace("\ncomplete -F ", "\ncomplete -o default -F ")
