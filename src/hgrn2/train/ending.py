"""Write the files of a run's end: gates, report, plots. A failure to write one does not fail the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgrn2.data.prepared import PreparedData
from hgrn2.data.sequential import sequential_windows
from hgrn2.errors import UserError
from hgrn2.extras import install_command
from hgrn2.train.compressors import compressed_bits
from hgrn2.train.gates import GATES_NAME, measure_gates
from hgrn2.train.metrics import append_record, read_metrics
from hgrn2.train.report import write_report

# held-out tokens for measuring gates: enough for a histogram, few enough for memory
_GATE_TOKENS = 8192


@dataclass(frozen=True)
class EndStep:
    """A measurement at the end of a run.

    Attributes:
        what: name of the measurement, for messages.
        file: the file in the run folder that it writes.
        measure: called with the run folder, the model in evaluation mode, its device and the run's last step.
        is_once: run only when the budget is used up; otherwise whenever the report is written.
    """

    what: str
    file: str
    measure: Callable[[Path, Any, torch.device, int], None]
    is_once: bool = False


def gates_step(data: PreparedData) -> EndStep:
    """Return the step that measures the gates of each layer on held-out text."""

    def measure(run_dir: Path, model: Any, device: torch.device, step: int) -> None:
        del step
        windows = sequential_windows(data.validation, _GATE_TOKENS, 1, max_tokens=_GATE_TOKENS)
        batch = next(iter(windows)).to(device)
        gates = measure_gates(model, batch.input_ids, batch.cu_seqlens)
        # remove gates of an earlier end of the run, which would look current
        (run_dir / GATES_NAME).unlink(missing_ok=True)
        if gates is not None:
            gates.save(run_dir)

    return EndStep("the gates", GATES_NAME, measure)


def compressors_step(data: PreparedData) -> EndStep:
    """Return the step that records how well compressors compress the held-out text."""

    def measure(run_dir: Path, model: Any, device: torch.device, step: int) -> None:
        del model, device
        bits, num_bytes = compressed_bits(data.validation, data.tokenizer)
        append_record(run_dir, {"kind": "compressors", "step": step, "text_bytes": num_bytes, "bits_per_byte": bits})

    return EndStep("the compressors' figures", "metrics.jsonl", measure, is_once=True)


@dataclass(frozen=True)
class Ending:
    """Write the files that a run leaves besides its checkpoints.

    Attributes:
        run_dir: the run folder, locked.
        model: the model after the last step.
        device: the device of the model.
        steps: the measurements.
        note: shows a line to the user, e.g. about a file that cannot be written.
    """

    run_dir: Path
    model: Any
    device: torch.device
    steps: Sequence[EndStep]
    note: Callable[[str], None]

    def report(self) -> Path | None:
        """Measure and write the report; None if it could not be written."""
        for step in self.steps:
            if not step.is_once:
                self._measure(step, 0)
        with self.failure_as_note("the report", "report.html"):
            return write_report(self.run_dir)
        return None

    def measure_once(self, last_step: int) -> bool:
        """Run the steps that are only for the end; return whether there were any.

        Args:
            last_step: the last step of the run.
        """
        steps = [step for step in self.steps if step.is_once]
        for step in steps:
            self._measure(step, last_step)
        return bool(steps)

    def pictures(self) -> list[Path]:
        """Draw the plots; return no paths if there is nothing to draw or matplotlib is missing."""
        try:
            # importing matplotlib takes a second, so import it only at the end
            from hgrn2.train.plots import plot_run
        except ImportError as error:
            self.note(f"no plots besides the report: {error.name} is not installed: {install_command('train')}")
            return []
        with self.failure_as_note("the plots", "plots"):
            # every step may have been skipped, or the time may have run out before the first
            has_learnt = any(r["kind"] == "train" and r["loss"] is not None for r in read_metrics(self.run_dir))
            return plot_run(self.run_dir) if has_learnt or (self.run_dir / GATES_NAME).exists() else []
        return []

    def _measure(self, step: EndStep, last_step: int) -> None:
        self.model.eval()
        try:
            with self.failure_as_note(step.what, step.file):
                step.measure(self.run_dir, self.model, self.device, last_step)
        finally:
            self.model.train()

    @contextmanager
    def failure_as_note(self, what: str, name: str) -> Iterator[None]:
        """Turn a failure into a note: the checkpoint is written, so the run has succeeded.

        Args:
            what: what is written, for the note.
            name: file or folder in the run folder.
        """
        try:
            yield
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self.note(
                f"trained, but {what} cannot be written ({self.run_dir / name}: {reason}); "
                f"once that is fixed: hgrn2 plot {self.run_dir}"
            )
