"""The one exception meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input the user gave cannot be used; the message says what, where, what was wanted and what to do.

    The command line prints it as one line and exits with status 2; from Python it is a ValueError.
    """


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
