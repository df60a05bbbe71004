"""Base of task options; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hgrn2.constraints import check_fields


@dataclass(frozen=True)
class TaskOptions:
    """Base of task options: a frozen dataclass with a default for every field except paths.

    `hgrn2.constraints.check_fields` checks the fields against their annotations.
    """

    what: ClassVar[str] = "task options"
    """Name of the options in messages."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Names of fields that hold a path."""

    def __post_init__(self) -> None:
        check_fields(self, self.what)

    @property
    def tokens_per_example(self) -> int:
        """Tokens of the budget that one example of a batch uses."""
        return 1
