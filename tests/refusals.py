"""Assertions about errors: by code and by the names they carry, never by their prose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hgrn2.errors import CODES, UserError


@contextmanager
def refuses(code: str, *names: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises a UserError with this code.

    Args:
        code: one of `hgrn2.errors.CODES`.
        *names: names and values of inputs, such as a setting, a path or a number, that the message must hold.
    """
    assert code in CODES, code
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, f"code {caught.value.code!r} instead of {code!r}: {caught.value}"
    missing = [str(name) for name in names if str(name) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
