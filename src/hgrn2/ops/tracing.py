"""Mark functions for torch.compile without importing it, which takes two seconds that most processes do not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_traces(function: Function) -> Function:
    """Mark a function whose result a trace treats as a constant, like torch.compiler.assume_constant_result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # pyright: ignore
    return function
