"""Parse JSON that may be damaged or hostile, and store a digest inside files that have no separate checksum.

Every JSON file of the project is parsed here, so that a bad file gives a one-line error and never a traceback.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError

DIGEST_KEY = "hgrn2_digest"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Args:
        text: the JSON; bytes must be UTF-8, and a byte order mark is dropped.

    Raises:
        ValueError: not JSON, nested too deep, or an integer with thousands of digits. The message is one line and
            does not name the file.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        # Python limits the digits of an integer
        raise ValueError("a number of thousands of digits") from None


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        remedy: what to do about a damaged file, for the message.

    Raises:
        UserError: the file cannot be read, is not JSON, or does not hold an object.
    """
    try:
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}", "unreadable") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}", "unreadable") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, wanted an object; {remedy}", "unreadable")
    return found


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with their digest as the last key."""
    return {**values, DIGEST_KEY: _digest(values)}


def check_digest(values: Mapping[str, Any], where: object, remedy: str) -> dict[str, Any]:
    """Return the values without their digest; values without a digest pass unchecked.

    Args:
        values: an object made by `with_digest` and read back from JSON; layout and key order do not matter.
        where: the file, for the message.
        remedy: what to do about a mismatch, for the message.

    Raises:
        UserError: a value, a key or the digest has changed.
    """
    rest = {key: value for key, value in values.items() if key != DIGEST_KEY}
    if DIGEST_KEY in values and values[DIGEST_KEY] != _digest(rest):
        raise UserError(
            f"{where}: damaged or edited (its content does not match its {DIGEST_KEY}); {remedy}", "damaged"
        )
    return rest


def _digest(values: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        # we never write anything this deep, so no stored digest can match
        return ""
    return hashlib.sha256(text.encode()).hexdigest()
