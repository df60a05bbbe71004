"""Parse settings of the form KEY=VALUE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.storage.json_files import parse_json

_NUMBERS = re.compile(r"-?\d+(\.\d+)?(,-?\d+(\.\d+)?)+")


def parse_key_values(words: Sequence[str], flag: str, what: str) -> dict[str, Any]:
    """Parse settings of the form KEY=VALUE, where a value is JSON, numbers with commas between them, or a plain word.

    Args:
        words: one setting each.
        flag: the flag before them, for messages.
        what: the kind of setting, for messages, e.g. "a setting of a model".

    Raises:
        UserError: a word has no key or no "=", or its value starts like JSON but is not JSON.
    """
    found = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not (key and sign):
            raise UserError(f"{flag} {word}: wanted KEY=VALUE")
        if _NUMBERS.fullmatch(value):
            # a list without its brackets
            value = f"[{value}]"
        try:
            found[key] = parse_json(value)
        except ValueError as error:
            # plain words need no quotes, but a value that starts like JSON must be JSON
            if value.lstrip()[:1] in ("[", "{") or value.isdecimal():
                raise UserError(f"{flag} {key}: not JSON ({error}); wanted {what}") from None
            found[key] = value
    return found
