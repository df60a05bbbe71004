"""The one exception meant for the person at the keyboard, and text made safe for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
