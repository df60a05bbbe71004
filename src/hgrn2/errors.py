"""The one exception meant for the person at the keyboard, and text made safe for a terminal."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

# what can be wrong with an input; programs and tests look at the code, people at the message
CODES = {
    "invalid-value": "a value of the wrong type, range, shape, dtype or device",
    "contradiction": "inputs that cannot stand together",
    "unknown-name": "a key, option, preset, backend or command that does not exist",
    "not-found": "a file, folder or entry that is not there",
    "already-exists": "a place that is taken, or a name that is registered twice",
    "unreadable": "a file that cannot be opened or is not in the expected format",
    "damaged": "a file that is not what was written",
    "version": "a file of a version that cannot be read",
    "mismatch": "parts of different models, tokenizers, data or runs",
    "unsupported": "something valid that this layout, backend or model cannot do",
    "unavailable": "a package, device or connection that this machine does not have",
    "in-use": "a folder that another process holds",
    "unwritable": "a place that cannot be written, or a full disk",
    "not-finite": "values that became infinite or not a number",
    "incomplete": "a part that lacks something its protocol asks for",
}


class UserError(ValueError):
    """Input that cannot be used; the message says what, where, what was wanted and what to do.

    The command line prints it as one line and exits with status 2; from Python it is a ValueError.

    Args:
        message: for people.
        code: for programs; one of `CODES`.

    Attributes:
        code: as given.
    """

    def __init__(self, message: str, code: str = "invalid-value") -> None:
        super().__init__(message)
        assert code in CODES, f"unknown error code {code!r}"
        self.code = code


class MissingPackage(UserError, ImportError):
    """A package of an extra is not installed; the message says how to install it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "unavailable")


def unknown_key_message(what: str, key: str, known: Iterable[str]) -> str:
    """One line about an unknown key, with the nearest known ones.

    Args:
        what: the thing the key belongs to, e.g. "model config".
        key: the key that was found.
        known: the keys that exist.
    """
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known keys: {', '.join(known)}"
    return f"{what}: unknown key {key!r}; {hint}"


# marks that change the direction of text, and separators that end a line on some terminals
_DIRECTION_MARKS = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Return a text with every character that a terminal would obey shown as U+FFFD.

    Args:
        text: what a model wrote, the name of a file, anything from outside.
        keep: control characters that stay; the rest of C0, DEL, C1 and marks of direction are replaced.

    Example:
        >>> visible("red\x1b[31m")
        'red�[31m'
    """
    return "".join("\ufffd" if _is_control(c) and c not in keep else c for c in text)


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c < "\xa0" or c in _DIRECTION_MARKS or "\ud800" <= c <= "\udfff"


_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word", type(None): "null"}


def check_types(values: Any, what: str, prefix: str = "") -> None:
    """Check every field of a dataclass against its annotation; fields of other types than plain ones are passed over.

    Args:
        values: the instance.
        what: the thing the fields belong to, e.g. "model config".
        prefix: stands before a field's name in the message.

    Raises:
        UserError: a value is not of its field's type. A whole number is a float too, a bool is no number.
    """
    for name, hint in typing.get_type_hints(type(values)).items():
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not set(allowed) <= _KINDS.keys():
            continue
        value = getattr(values, name)
        if not any(_is_of_kind(value, kind) for kind in allowed):
            wanted = " or ".join(_KINDS[kind] for kind in allowed)
            raise UserError(f"{what}: {prefix}{name} is {value!r}; wanted {wanted}")


def _is_of_kind(value: Any, kind: type) -> bool:
    if kind is not float:
        return type(value) is kind
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        # a whole number beyond the largest float
        return False
