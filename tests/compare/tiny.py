"""Comparisons small enough for tests, and folders of runs that were never trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hgrn2.compare.config import Comparison
from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import RUNS_NAME, Plan, make_plan

MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}
MODELS = {"hgrn2": {}, "attention": {"mixers": {"attention": {"num_heads": 2}}}}
MQAR = {"length": 16, "num_pairs": 2, "vocab_size": 16, "validation_examples": 16, "batch_size": 4, "max_steps": 6}


def tables(**changes):
    found = {
        "seeds": [0],
        "learning_rates": [1e-2],
        "model": MODEL,
        "models": MODELS,
        "tasks": {"mqar": MQAR},
        "train": {"device": "cpu", "num_threads": 1, "warmup_steps": 1},
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def comparison(**changes) -> Comparison:
    return Comparison.from_tables(tables(**changes))


def invent(out: Path, planned_of: Comparison, values: dict[str, float | None]) -> Plan:
    """Writes the folder of a comparison whose runs reached these accuracies; None for one that diverged."""
    out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(planned_of, out)
    plan.save(out)
    for run in plan.runs:
        value = values[run.folder]
        folder = out / RUNS_NAME / run.folder
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _records(value)))
        settings = run.run_settings.resolved().to_saved(folder)
        (folder / "config.json").write_text(json.dumps({"model": run.model_config, **settings}))
        (Outcome("diverged", "loss <b>not</b> finite") if value is None else Outcome("finished")).save(folder)
    return plan


def _records(value):
    yield {"kind": "start", "step": 0, "device": "cpu", "num_threads": 1, "torch": "2", "hgrn2": "0"}
    for step in range(1, 41):
        common = {"step": step, "tokens": 64 * step, "elapsed_s": 0.1 * step}
        loss = None if value is None else 1 + math.exp(-step / 10) + value
        yield {"kind": "train", **common, "loss": loss, "tokens_per_s": 640.0, "memory_bytes": 10**8}
    if value is not None:
        figures = {"val_loss": 1.0, "val_accuracy": value, "val_exact": value / 2}
        more = {"val_accuracy_length_32": value / 2, "val_accuracy_length_64": value / 4}
        yield {"kind": "validation", **common, **figures, **more}
