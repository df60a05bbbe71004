"""metrics.jsonl: one JSON object a line, whole lines only, nothing from after the step a run resumes at."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hgrn2.data.staging import staged_file
from hgrn2.errors import UserError

METRICS_NAME = "metrics.jsonl"
# figures that readers rely on, by the kind of record; those that may be null were not finite, or not measured
_NUMBERS = {"train": ("tokens", "elapsed_s"), "validation": ("tokens", "elapsed_s")}
_NUMBERS_OR_NULL = {"train": ("loss",), "validation": ("val_loss",)}
_OPTIONAL = ("val_bits_per_byte",)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a metrics file; a last line torn by a kill is left out.

    Args:
        path: the file, or the run folder that holds it.

    Raises:
        UserError: there is no such file, or a whole line is no JSON object, or no record of a run.
    """
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run folder that has {METRICS_NAME}")
    # a line without its newline was cut off while it was written, even if what is there parses
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: found {type(record).__name__}, wanted an object; remove the line")
        if fault := _fault(record):
            raise UserError(f"{path}, line {number}: {fault}; remove the line")
        records.append(record)
    return records


def _fault(record: dict[str, Any]) -> str | None:
    """What is wrong with a record, or None."""
    kind = record.get("kind")
    if not isinstance(kind, str):
        return f"kind is {kind!r}, wanted a word"
    if type(record.get("step")) is not int:
        return f"step is {record.get('step')!r}, wanted a whole number"
    for key in (*_NUMBERS.get(kind, ()), *_NUMBERS_OR_NULL.get(kind, ()), *_OPTIONAL):
        if key not in record and key not in _OPTIONAL:
            return f"a {kind} record without {key}"
        value = record.get(key)
        nullable = key not in _NUMBERS.get(kind, ())
        # the comparison is false for NaN, and does not overflow for whole numbers of any length
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        if not (number or (value is None and nullable)):
            return f"{key} is {value!r}, wanted a number"
    return None


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity: they become null
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


class MetricsWriter:
    """Appends records to metrics.jsonl, each flushed as it is written, and to TensorBoard if asked.

    Args:
        run_dir: the run folder.
        resume_step: records of later steps, and a torn last line, are dropped first; 0 drops everything.
        tensorboard: also write event files under run_dir / "tensorboard".
        before_dropping: called when nothing can refuse any more, before the records are dropped.

    Raises:
        UserError: TensorBoard is asked for and not installed, or the file that is there cannot be read.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int = 0,
        tensorboard: bool = False,
        before_dropping: Callable[[], None] = lambda: None,
    ) -> None:
        path = run_dir / METRICS_NAME
        kept = [r for r in read_metrics(path) if r["step"] <= resume_step] if path.exists() and resume_step else []
        with staged_file(path) as partial:
            partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            self._board = _tensorboard_writer(run_dir / "tensorboard", resume_step) if tensorboard else None
            before_dropping()
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; "kind" and "step" say what it is."""
        self._file.write(_line(record))
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, float | int) and key not in ("step", "tokens") and math.isfinite(value):
                    self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def sync(self) -> None:
        """Force everything written so far to the disk."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files; a full disk may leave an unfinished last line, which readers leave out."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tensorboard_writer(directory: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard: not installed; pip install 'hgrn2[tensorboard]', or leave the flag away"
        ) from None
    # purge_step hides the events of the steps that are about to be trained again, of a run begun anew all of them
    return SummaryWriter(str(directory), purge_step=resume_step + 1)
