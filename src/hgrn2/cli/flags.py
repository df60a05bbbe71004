"""Read the flags of a command from its signature and docstrings, for help and suggestions."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any

import docstring_parser
import tyro

from hgrn2.cli.command import Function
from hgrn2.errors import UserError
from hgrn2.models.presets import PRESETS

_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]

_PLACEHOLDERS_OF_TYPES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
# placeholders of flags and fields by name, where the type is not enough
_PLACEHOLDERS = {
    "batch_size": "N",
    "data": "PATH",
    "device": "DEVICE",
    "files": "PATH",
    "freeze": "PATTERNS",
    "gpu_gib": "GIB",
    "from_": "MODEL",
    "keep_attention": "LAYERS",
    "max_shard_size": "SIZE",
    "max_time_s": "SECONDS",
    "model": "MODEL",
    "set": "KEY=VALUE",
    "task": "TASK",
    "task_set": "KEY=VALUE",
    "tasks": "TASK",
    "teacher": "MODEL",
    "text_field": "FIELD",
    "tokenizer": "TOKENIZER",
    "validation": "PATH",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag or positional argument.

    Attributes:
        field: name of the parameter or of the field of a dataclass, e.g. "max_steps".
        is_positional: it has no name on the command line.
        is_switch: it takes no value and has a `--no-` form.
        placeholder: name of its value in the help; empty for a switch.
        text: what it does, with its default.
    """

    field: str
    is_positional: bool
    is_switch: bool
    placeholder: str
    text: str

    @property
    def name(self) -> str:
        """The flag as it is typed, e.g. "--max-steps"; for a positional, its placeholder."""
        # a parameter named like a Python keyword ends in an underscore
        return self.placeholder if self.is_positional else f"--{self.field.removesuffix('_').replace('_', '-')}"

    @property
    def takes_several(self) -> bool:
        """Whether several words may follow it."""
        return " [" in self.placeholder and not self.is_positional

    @property
    def label(self) -> str:
        """The name with the placeholder."""
        return f"{self.name} {self.placeholder}" if self.placeholder and not self.is_positional else self.name


def flags_of(function: Function) -> list[Flag]:
    """Return the flags of a command in the order of its signature; a dataclass stands for its fields.

    Raises:
        UserError: a parameter has no type, or one that flags cannot have.
    """
    found = []
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    # a name that does not exist; any error, since annotations are code
    except Exception as error:
        raise UserError(
            f"{_called(function)}: its types cannot be read ({error}); correct them", "incomplete"
        ) from None
    texts = _texts(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            found += _flags_of_fields(parameter.default)
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise UserError(f"{_called(function)}: takes {parameter}; wanted parameters with names", "incomplete")
        elif name not in hints:
            raise UserError(f"{_called(function)}: {name} has no type; annotate it", "incomplete")
        else:
            try:
                found.append(_flag(name, hints[name], parameter.default, texts.get(name, "")))
            except UserError as error:
                raise UserError(f"{_called(function)}: {error}", error.code) from None
    return found


def _called(function: Function) -> str:
    return f"function {function.__qualname__}"


def _flags_of_fields(values: Any) -> list[Flag]:
    hints, texts = typing.get_type_hints(type(values)), {}
    for kind in reversed(type(values).__mro__[:-1]):
        texts |= _texts(kind)
    # `given` is not a flag; parsing.py fills it
    names = [field.name for field in dataclasses.fields(values) if field.name != "given"]
    return [_flag(name, hints[name], getattr(values, name), texts.get(name, "")) for name in names]


def _texts(thing: Any) -> dict[str, str]:
    """Return the descriptions of parameters or fields by name, with the names that exist filled in."""
    documented = docstring_parser.parse_from_object(thing)
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in documented.params}
    return {name: text.replace("{presets}", ", ".join(PRESETS)) for name, text in texts.items()}


def _flag(name: str, hint: Any, default: Any, text: str) -> Flag:
    marks = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if marks else hint
    is_switch = kind is bool
    is_positional = _POSITIONAL in marks
    if default not in (None, inspect.Parameter.empty, False, (), "") and "(default" not in text:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text.removesuffix('.')} (default: {shown})."
    placeholder = "" if is_switch else _placeholder(name, kind, is_positional)
    if is_positional and default is None:
        placeholder = f"[{placeholder}]"
    return Flag(name, is_positional, is_switch, placeholder, text)


def _placeholder(name: str, kind: Any, is_positional: bool) -> str:
    whole = kind
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
        kind = kinds[0] if len(kinds) == 1 else None
    if typing.get_origin(kind) is typing.Literal and all(isinstance(word, str) for word in typing.get_args(kind)):
        return "|".join(typing.get_args(kind))
    several = typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,)
    if several:
        kind = typing.get_args(kind)[0]
    # any hashable type may be an annotation
    if kind not in _PLACEHOLDERS_OF_TYPES:
        raise UserError(
            f"{name} is annotated {whole}; wanted bool, int, float, str, Path, Literal of words, one of them | "
            "None, or a tuple[..., ...] of one",
            "incomplete",
        )
    word = _PLACEHOLDERS.get(name) or (name.upper() if is_positional else _PLACEHOLDERS_OF_TYPES[kind])
    if several and is_positional:
        # the parser also accepts none
        return f"[{word} ...]"
    return f"{word} [{word} ...]" if several else word
