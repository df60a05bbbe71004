"""Read and write metrics.jsonl: one JSON record per line, complete lines only."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.extras import install_command
from hgrn2.storage.json_files import parse_json
from hgrn2.storage.staging import staged_file

METRICS_NAME = "metrics.jsonl"
# checksum of the record without this key; older runs, and lines appended by hand, lack it
_CHECKSUM = "crc32"
_COMMON = {"kind", "step", "tokens", "elapsed_s", _CHECKSUM}
# allowed keys of a line without a checksum, where any other key is a damaged name
_KEYS = {
    "start": _COMMON | {"device", "num_threads", "torch", "hgrn2", "parameters", "data", "prompt"},
    "train": _COMMON
    | {
        "loss",
        "smoothed_loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
        "memory_bytes",
        "skipped_steps",
        "figures",
    },
    "validation": _COMMON | {"val_loss", "val_perplexity", "val_bits_per_byte", "val_tokens", "val_text_bytes"},
    "sample": _COMMON | {"text"},
    "unfreeze": _COMMON,
    "compressors": _COMMON | {"text_bytes", "bits_per_byte"},
}
# figures that readers need, by kind of record; null stands for values that were not finite or not measured
_NUMBERS = {"train": ("tokens", "elapsed_s"), "validation": ("tokens", "elapsed_s")}
_NUMBERS_OR_NULL = {"train": ("loss",), "validation": ("val_loss",)}
_OPTIONAL = ("val_bits_per_byte",)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every complete record of a metrics file; a last line cut off by a kill is skipped.

    Args:
        path: the file, or the run folder that holds it.

    Returns:
        The records, without their checksums.

    Raises:
        UserError: there is no such file, or a complete line is not a record, or not as it was written.
    """
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run folder that has {METRICS_NAME}", "not-found")
    *lines, torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line", "damaged") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: found {type(record).__name__}, wanted an object; remove the line", "damaged"
            )
        if fault := _fault(record):
            raise UserError(f"{path}, line {number}: {fault}; remove the line", "damaged")
        record.pop(_CHECKSUM, None)
        records.append(record)
    # a line cut off by a kill has nothing after its record
    if (end := torn.rfind(b"}")) >= 0 and torn[end + 1 :] and _is_json(torn[: end + 1]):
        raise UserError(f"{path}, line {len(lines) + 1}: has text after its record; remove the line", "damaged")
    return records


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _fault(record: dict[str, Any]) -> str | None:
    """Return what is wrong with a record; None if nothing is."""
    kind = record.get("kind")
    if not isinstance(kind, str):
        return f"kind is {kind!r}, wanted a word"
    if type(record.get("step")) is not int:
        return f"step is {_shown(record.get('step'))}, wanted a whole number"
    if _CHECKSUM in record:
        rest = {key: value for key, value in record.items() if key != _CHECKSUM}
        if record[_CHECKSUM] != _checksum(rest):
            return f"damaged or edited (its content does not match its {_CHECKSUM})"
    elif unknown := _unknown(kind, record):
        return unknown
    for key in (*_NUMBERS.get(kind, ()), *_NUMBERS_OR_NULL.get(kind, ()), *_OPTIONAL):
        if key not in record and key not in _OPTIONAL:
            return f"a {kind} record without {key}"
        value = record.get(key)
        nullable = key not in _NUMBERS.get(kind, ())
        if not (_is_number(value) or (value is None and nullable)):
            return f"{key} is {_shown(value)}, wanted a number"
    return None


def _unknown(kind: str, record: dict[str, Any]) -> str | None:
    if kind not in _KEYS:
        return unknown_key_message("kind of record", kind, _KEYS)
    for key in record.keys() - _KEYS[kind]:
        if kind != "validation" or not (record[key] is None or _is_number(record[key])):
            return unknown_key_message(f"a {kind} record", key, _KEYS[kind])
    return None


def _is_number(value: Any) -> bool:
    # the comparison is False for NaN and does not overflow for large integers
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checksum(record: dict[str, Any]) -> str:
    # computed from the values, so other tools may change layout and order
    try:
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except (RecursionError, ValueError):
        # we never write such a record, so no checksum can match
        return ""
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN or infinity; write null
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps({**finite, _CHECKSUM: _checksum(finite)}, ensure_ascii=False) + "\n"


def append_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Append one record to the metrics of a run that has ended.

    Args:
        run_dir: the run folder, locked.
        record: the record, with "kind" and "step".
    """
    with (run_dir / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write(_line(record))


def write_records(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the metrics of a run that was trained elsewhere, replacing those in the folder.

    Args:
        run_dir: the run folder.
        records: as from `read_metrics`.
    """
    with staged_file(run_dir / METRICS_NAME) as partial:
        partial.write_text("".join(_line(dict(record)) for record in records), encoding="utf-8")


class MetricsWriter:
    """Append records to metrics.jsonl, flushing each, and optionally to TensorBoard.

    Args:
        run_dir: the run folder.
        resume_step: drop records of later steps and an incomplete last line first; 0 drops everything.
        tensorboard: also write event files under run_dir / "tensorboard".
        before_dropping: called after all checks, before records are dropped.

    Attributes:
        num_records: number of records in the file.

    Raises:
        UserError: TensorBoard is requested but not installed, or the existing file cannot be read.
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
        self.num_records = len(kept)
        with staged_file(path) as partial:
            partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            self._board = _tensorboard_writer(run_dir / "tensorboard", resume_step) if tensorboard else None
            before_dropping()
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which has "kind" and "step"."""
        self.num_records += 1
        self._file.write(_line(record))
        self._file.flush()
        if self._board is not None:
            for key, value in {**record, **record.get("figures", {})}.items():
                if isinstance(value, float | int) and key not in ("step", "tokens") and math.isfinite(value):
                    self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def sync(self) -> None:
        """Flush everything written so far to the disk."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files; a full disk may leave an incomplete last line, which readers skip."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SilentMetrics:
    """Takes records and writes nothing: for ranks other than the main one."""

    num_records = 0

    def write(self, record: dict[str, Any]) -> None:
        """Drop the record."""

    def sync(self) -> None:
        """Do nothing."""

    def __enter__(self) -> SilentMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _tensorboard_writer(directory: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        command = install_command("tensorboard")
        raise UserError(f"tensorboard is not installed: {command}, or drop the setting", "unavailable") from None
    # purge_step hides events of steps that will be trained again; for a new run, all of them
    return SummaryWriter(str(directory), purge_step=resume_step + 1)
