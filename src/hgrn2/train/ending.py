"""Files that a run writes when it ends: gates, report, pictures. A failure to write one does not fail the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hgrn2.data.prepared import PreparedData
from hgrn2.data.sequential import sequential_windows
from hgrn2.errors import UserError
from hgrn2.extras import install_command
from hgrn2.models import HGRN2LM
from hgrn2.train.compressors import compressed_bits
from hgrn2.train.gates import GATES_NAME, measure_gates
from hgrn2.train.metrics import append_record, read_metrics
from hgrn2.train.report import write_report

# tokens of held-out text that the gates are measured on: enough for a histogram, little to hold at once
_GATE_TOKENS = 8192


@dataclass(frozen=True)
class Ending:
    """Writes the files that a run leaves beside its checkpoints.

    Attributes:
        run_dir: the run folder, locked.
        model: as it is after the last step.
        data: what it was trained on.
        device: where the model is.
        note: shows a line to the user, such as about a file that cannot be written.
    """

    run_dir: Path
    model: HGRN2LM
    data: PreparedData
    device: torch.device
    note: Callable[[str], None]

    def report(self) -> Path | None:
        """Measure the gates and write the report; None if it could not be written."""
        with self._failure_as_note("the gates", GATES_NAME):
            self._measure_gates()
        with self._failure_as_note("the report", "report.html"):
            return write_report(self.run_dir)
        return None

    def compare_compressors(self, step: int) -> None:
        """Record what compressors make of the held-out text.

        Args:
            step: the run's last.
        """
        with self._failure_as_note("the compressors' figures", "metrics.jsonl"):
            bits, num_bytes = compressed_bits(self.data.validation, self.data.tokenizer)
            record = {"kind": "compressors", "step": step, "text_bytes": num_bytes, "bits_per_byte": bits}
            append_record(self.run_dir, record)

    def pictures(self) -> list[Path]:
        """Draw the pictures; none if there is nothing to draw, or nothing to draw with."""
        try:
            # matplotlib takes a second to import, which only the end of a run should wait for
            from hgrn2.train.plots import plot_run
        except ImportError as error:
            self.note(f"no pictures beside the report: {error.name} is not installed: {install_command('train')}")
            return []
        with self._failure_as_note("the pictures", "plots"):
            # every step may have been skipped, or the time may have run out before the first
            has_learnt = any(r["kind"] == "train" and r["loss"] is not None for r in read_metrics(self.run_dir))
            return plot_run(self.run_dir) if has_learnt or (self.run_dir / GATES_NAME).exists() else []
        return []

    def _measure_gates(self) -> None:
        windows = sequential_windows(self.data.validation, _GATE_TOKENS, 1, max_tokens=_GATE_TOKENS)
        batch = next(iter(windows)).to(self.device)
        self.model.eval()
        try:
            gates = measure_gates(self.model, batch.input_ids, batch.cu_seqlens)
        finally:
            self.model.train()
        # gates measured at an earlier end of the run would pass for current ones
        (self.run_dir / GATES_NAME).unlink(missing_ok=True)
        if gates is not None:
            gates.save(self.run_dir)

    @contextmanager
    def _failure_as_note(self, what: str, name: str) -> Iterator[None]:
        """Turn a failure into a note: the checkpoint is written, and the run has done its work."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self.note(
                f"trained, but {what} cannot be written ({self.run_dir / name}: {reason}); "
                f"when that is mended: hgrn2 plot {self.run_dir}"
            )
