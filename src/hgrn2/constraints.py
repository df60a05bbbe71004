"""Constraints of settings as types: `Annotated[int, Ge(1)]`, checked by one function."""

from __future__ import annotations

import math
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hgrn2.errors import UserError

# torch and safetensors hold whole numbers in 64 bits
_INT_LIMIT = 2**63
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word", type(None): "null"}


@dataclass(frozen=True)
class _Bound:
    limit: float
    holds: ClassVar[Callable[[Any, Any], bool]]

    def __str__(self) -> str:
        limit = self.limit
        if isinstance(limit, float):
            return f"{limit:g}"
        is_power = abs(limit) >= 2**32 and abs(limit) & (abs(limit) - 1) == 0
        return f"{'-' if limit < 0 else ''}2^{limit.bit_length() - 1}" if is_power else str(limit)


class Ge(_Bound):
    """Greater than or equal to the limit."""

    holds = operator.ge


class Gt(_Bound):
    """Greater than the limit."""

    holds = operator.gt


class Le(_Bound):
    """Less than or equal to the limit."""

    holds = operator.le


class Lt(_Bound):
    """Less than the limit."""

    holds = operator.lt


def check_fields(values: Any, what: str) -> None:
    """Check every field of a dataclass against its annotation: plain types, `Literal`, and bounds in `Annotated`.

    Fields of other types are not checked. Integers are accepted as floats; bools are not numbers. Integers with
    bounds but no upper one must be less than 2^63. None is not checked against bounds.

    Args:
        values: the instance.
        what: owner of the fields for messages, e.g. "model config".

    Raises:
        UserError: a value has the wrong type or violates a bound.

    Example:
        >>> @dataclass
        ... class Options:
        ...     length: typing.Annotated[int, Ge(1)] = 8
        >>> check_fields(Options(0), "options")
        Traceback (most recent call last):
        hgrn2.errors.UserError: options: length is 0; wanted 1 or more
    """
    for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
        if typing.get_origin(hint) is ClassVar:
            continue
        bounds = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, _Bound)]
        if hasattr(hint, "__metadata__"):
            hint = typing.get_args(hint)[0]
        value = getattr(values, name)
        if (fault := _type_fault(value, hint)) or (fault := _bound_fault(name, value, hint, bounds)):
            raise UserError(f"{what}: {name} {fault}")


def _type_fault(value: Any, hint: Any) -> str | None:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if isinstance(value, str) and value in choices:
            return None
        return f"is {value!r}; wanted {' or '.join(map(str, choices))}"
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not set(allowed) <= _KINDS.keys() or any(_is_of_kind(value, kind) for kind in allowed):
        return None
    return f"is {value!r}; wanted {' or '.join(_KINDS[kind] for kind in allowed)}"


def _bound_fault(name: str, value: Any, hint: Any, bounds: list[_Bound]) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if broken := [bound for bound in bounds if not type(bound).holds(value, bound.limit)]:
        # for an integer, report only the violated bound
        return f"is {value}; wanted {_describe_bounds(name, broken if isinstance(value, int) else bounds)}"
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    has_upper = any(isinstance(bound, Le | Lt) for bound in bounds)
    if bounds and int in allowed and not has_upper and value >= _INT_LIMIT:
        return f"has {len(str(value))} digits; wanted less than 2^63"
    return None


def _describe_bounds(name: str, bounds: list[_Bound]) -> str:
    low = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    high = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    if low is not None and high is not None:
        if isinstance(low, Ge) and isinstance(high, Le):
            return f"{low} to {high}"
        return f"{low} {'<=' if isinstance(low, Ge) else '<'} {name} {'<=' if isinstance(high, Le) else '<'} {high}"
    if low is not None:
        return f"{low} or more" if isinstance(low, Ge) else f"more than {low}"
    return f"at most {high}" if isinstance(high, Le) else f"less than {high}"


def _is_of_kind(value: Any, kind: type) -> bool:
    if kind is not float:
        return type(value) is kind
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        # a whole number beyond the largest float
        return False
