"""The exception for errors that users can fix, and text made safe for terminals."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# kinds of errors; programs and tests use the code, people read the message
CODES = {
    "invalid-value": "a value of the wrong type, range, shape, dtype or device",
    "contradiction": "inputs that contradict each other",
    "unknown-name": "a key, option, preset, backend or command that does not exist",
    "not-found": "a file, folder or entry that is not there",
    "already-exists": "a path that exists, or a name that is registered twice",
    "unreadable": "a file that cannot be opened or is not in the expected format",
    "damaged": "a file whose content has changed since it was written",
    "version": "a file of a version that cannot be read",
    "mismatch": "parts that belong to different models, tokenizers, data or runs",
    "unsupported": "a valid request that this layout, backend or model does not support",
    "unavailable": "a package, device or connection that this machine does not have",
    "in-use": "a folder that another process is using",
    "unwritable": "a path that cannot be written, or a full disk",
    "not-finite": "values that became infinite or not a number",
    "incomplete": "a definition that lacks a required part",
}


class UserError(ValueError):
    """An error that the user can fix; the message says what was found, what was wanted and what to do.

    The command line prints it as one line and exits with status 2. In Python it is a ValueError.

    Args:
        message: message for people.
        code: kind of error for programs, one of `CODES`.

    Attributes:
        code: the code.
    """

    def __init__(self, message: str, code: str = "invalid-value") -> None:
        # not through super(), which torch.compile cannot trace: it would hide the message
        self.args = (message,)
        assert code in CODES, f"unknown error code {code!r}"
        self.code = code


class MissingPackage(UserError, ImportError):
    """A package of an extra is not installed; the message says how to install it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "unavailable")


def unknown_key_message(what: str, key: object, known: Iterable[str], kind: str = "key") -> str:
    """Return a one-line message about an unknown key, with near matches.

    Args:
        what: owner of the key, e.g. "model config".
        key: the unknown key; may be of any type.
        known: the valid keys.
        kind: what a key is the name of, e.g. "task".
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known {kind}s: {', '.join(known)}"
    return f"{what}: unknown {kind} {key!r}; {hint}"


# direction marks, and separators that end a line on some terminals
_DIRECTION_MARKS = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Return a text with control characters and direction marks replaced by U+FFFD.

    Args:
        text: generated text, a file name, or any other foreign text.
        keep: control characters to keep; the rest of C0, DEL, C1 and direction marks are replaced.

    Example:
        >>> visible("red\x1b[31m")
        'red�[31m'
    """
    return "".join("\ufffd" if _is_control(c) and c not in keep else c for c in text)


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c < "\xa0" or c in _DIRECTION_MARKS or "\ud800" <= c <= "\udfff"
