"""What a run leaves beside its checkpoints when it ends: gates, report, pictures. None of them can fail the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgrn2.data.prepared import PreparedData
from hgrn2.data.sequential import sequential_windows
from hgrn2.errors import UserError
from hgrn2.extras import install_command
from hgrn2.models import HGRN2LM
from hgrn2.train.compressors import compressed_bits
from hgrn2.train.config import TrainConfig
from hgrn2.train.gates import GATES_NAME, measure_gates
from hgrn2.train.hints import first_words
from hgrn2.train.metrics import append_record, read_metrics
from hgrn2.train.report import write_report

# tokens of held-out text that the gates are measured on: enough for a histogram, little to hold at once
_GATE_TOKENS = 8192


def describe(model: HGRN2LM, data: PreparedData, config: TrainConfig) -> dict[str, Any]:
    """Return what a run's first record says of the model and the data, for its report.

    Args:
        model: to train.
        data: prepared tokens.
        config: the settings.

    Returns:
        parameters, data (sizes of both parts), prompt (a few words to continue); JSON values.
    """
    prompt = config.sample_prompt
    if not prompt.isprintable() or prompt != prompt.strip() or not prompt:
        prompt = first_words(data.validation, data.tokenizer)
    sizes = {
        side: {"documents": part.num_documents, "text_bytes": part.num_text_bytes, "tokens": part.num_tokens}
        for side, part in (("train", data.train), ("validation", data.validation))
    }
    about = {"tokenizer": data.tokenizer.name, "vocab_size": data.tokenizer.vocab_size}
    skipped = data.manifest.get("skipped", {})
    return {"parameters": model.num_parameters(), "data": {**about, **sizes, "skipped": skipped}, "prompt": prompt}


@dataclass(frozen=True)
class Ending:
    """Writes what a run leaves.

    Attributes:
        run_dir: the run folder, locked.
        model: as it is after the last step.
        data: what it was trained on.
        device: where the model is.
        note: shows a line to the person; what cannot be written is noted so.
    """

    run_dir: Path
    model: HGRN2LM
    data: PreparedData
    device: torch.device
    note: Callable[[str], None]

    def report(self) -> Path | None:
        """Measure the gates and write the report; None if it could not be written."""
        with self._noted("the gates", GATES_NAME):
            self._measure_gates()
        with self._noted("the report", "report.html"):
            return write_report(self.run_dir)
        return None

    def compare_compressors(self, step: int) -> None:
        """Record what compressors make of the held-out text.

        Args:
            step: the run's last.
        """
        bits, num_bytes = compressed_bits(self.data.validation, self.data.tokenizer)
        record = {"kind": "compressors", "step": step, "text_bytes": num_bytes, "bits_per_byte": bits}
        with self._noted("the compressors' figures", "metrics.jsonl"):
            append_record(self.run_dir, record)

    def pictures(self) -> list[Path]:
        """Draw the pictures; none if there is nothing to draw, or nothing to draw with."""
        try:
            # matplotlib takes a second to import, which only the end of a run should wait for
            from hgrn2.train.plots import plot_run
        except ImportError as error:
            self.note(f"no pictures beside the report: {error.name} is not installed: {install_command('train')}")
            return []
        with self._noted("the pictures", "plots"):
            # the steps may all have been skipped, or the time have been up before the first
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
        # those of an earlier end of the run would pass for today's
        (self.run_dir / GATES_NAME).unlink(missing_ok=True)
        if gates is not None:
            gates.save(self.run_dir)

    @contextmanager
    def _noted(self, what: str, name: str) -> Any:
        """Turn what goes wrong into a note: the checkpoint is written, and the run has done its work."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self.note(
                f"trained, but {what} cannot be written ({self.run_dir / name}: {reason}); "
                f"when that is mended: hgrn2 plot {self.run_dir}"
            )
