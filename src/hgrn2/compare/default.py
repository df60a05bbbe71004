"""The comparison of `hgrn2 compare` without a file: all mixers, two tasks, tiny models, ten minutes on two cores."""

from __future__ import annotations

from typing import Any

from hgrn2.compare.config import Comparison
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.models.pattern import DEFAULT_MIXER
from hgrn2.nn.mixers import find_mixer, mixer_names
from hgrn2.tasks import TASKS, find_task

# seconds of the whole comparison, of what is not training (text, sizes, report), and of starting and ending a run
_TOTAL_S, _AROUND_S, _AROUND_RUN_S = 600.0, 60.0, 5.0
_LEAST_RUN_S = 3.0
# runs side by side: one per core
_JOBS = 2
_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "expand_ratio": 32,
    "intermediate_size": 192,
    "tie_word_embeddings": True,
}
_TRAIN = {"schedule": "cosine", "weight_decay": 0.1, "checkpoint_every": 0, "device": "auto"}
# of mixers whose options have no defaults; heads of width 32
_OPTIONS = {"num_heads": 2}
# settings of the first task among these that is registered, after the text
_SYNTHETIC: dict[str, dict[str, Any]] = {
    "mqar": {"length": 16, "num_pairs": 2, "vocab_size": 32, "batch_size": 32, "max_tokens": 300_000},
}
_TEXT = {
    "task": "language",
    "seq_len": 256,
    "batch_size": 8,
    "max_tokens": 200_000,
    "validation_tokens": 16_384,
    "validation_every": 50,
    "data": {"data": ["stdlib"], "validation": ["stdlib-validation"], "tokenizer": "bytes"},
}


def default_comparison() -> tuple[Comparison, list[str]]:
    """Return the comparison that needs no file, and a line about each mixer that is left out.

    Every run has the same budget of tokens. max_time_s caps it so that all runs together stay within ten minutes with
    two runs side by side: (600 s - 60 s) * 2 / runs, less 5 s for starting and ending a run. A fast machine never
    reaches the cap. If a run does, its learning rate still decays to the end, and the report names the run.
    """
    models, notes = default_models()
    tasks = {"text": dict(_TEXT)} | default_synthetic()
    rates = [2e-3, 8e-3]
    num_runs = len(models) * len(tasks) * len(rates)
    max_time_s = max(_LEAST_RUN_S, (_TOTAL_S - _AROUND_S) * _JOBS / num_runs - _AROUND_RUN_S)
    tables = {
        "seeds": [0],
        "learning_rates": rates,
        "model": _MODEL,
        "models": models,
        "tasks": tasks,
        "train": {**_TRAIN, "max_time_s": float(round(max_time_s)), "num_threads": 1},
    }
    return Comparison.from_tables(tables, "default comparison"), notes


def default_models() -> tuple[dict[str, Any], list[str]]:
    """Return a model for every registered mixer that packs documents, and a line about each that is left out."""
    models: dict[str, Any] = {}
    notes = []
    # the first model sets the size of all
    for name in sorted(mixer_names(), key=lambda name: name != DEFAULT_MIXER):
        if not find_mixer(name).mixer.can_pack:
            notes.append(f"mixer {name!r} is left out: it cannot pack documents")
            continue
        fault = ""
        for options in ({}, _OPTIONS):
            settings: dict[str, Any] = {"layers": name} | ({"mixers": {name: options}} if options else {})
            try:
                HGRN2Config.from_dict({"vocab_size": 256, **_MODEL, **settings})
            except UserError as error:
                fault = fault or str(error)
                continue
            models[name] = settings
            break
        else:
            notes.append(f"mixer {name!r} is left out: {fault}")
    return models, notes


def default_synthetic() -> dict[str, Any]:
    """Return the table of MQAR, or of another task that generates its data; empty if there is none."""
    for name, settings in _SYNTHETIC.items():
        if name in TASKS:
            return {name: {"task": name, "validation_every": 200, "validation_examples": 500, **settings}}
    others = [name for name in TASKS if not find_task(name).reads_text]
    return {others[0]: {"task": others[0], "max_tokens": 500_000, "batch_size": 32}} if others else {}
