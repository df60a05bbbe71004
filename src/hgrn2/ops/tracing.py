"""A mark for torch.compile that does not import it: that takes two seconds, and most processes compile nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_traces(function: Function) -> Function:
    """Let a trace take the result of a function for a constant, as torch.compiler.assume_constant_result does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # pyright: ignore
    return function
