"""Outcomes of the runs of a comparison, kept in their folders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hgrn2.errors import UserError
from hgrn2.storage.json_files import read_json_object
from hgrn2.storage.staging import write_text_atomic

OUTCOME_NAME = "outcome.json"
State = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        state: "finished", "diverged" (values became infinite or not a number) or "failed" (anything else).
        reason: why it diverged or failed, in one line; empty for a finished run.
    """

    state: State
    reason: str = ""

    @property
    def is_final(self) -> bool:
        """Whether training again would end the same way; a failed run is tried again by the next call."""
        return self.state != "failed"

    def save(self, run_dir: Path) -> None:
        """Write outcome.json into a run folder, atomically."""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(run_dir / OUTCOME_NAME, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> Outcome | None:
        """Read outcome.json; None if the run has not ended, or if the file is damaged."""
        path = run_dir / OUTCOME_NAME
        if not path.is_file():
            return None
        try:
            found = read_json_object(path, "remove it")
        except UserError:
            return None
        states: dict[Any, State] = {state: state for state in get_args(State)}
        state = states.get(str(found.get("state")))
        return None if state is None else cls(state, str(found.get("reason", "")))
