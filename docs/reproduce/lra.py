"""Train every mixer on a task of Long Range Arena: equal parameters, equal steps.

Example:
    python docs/reproduce/lra.py docs/reproduce/lra/listops.toml --mixers hgrn2,hgrn1,attention,mamba --out runs/lra

Each run writes its validations to OUT/TASK.jsonl as they come. With several GPUs, runs go side by side.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from hgrn2.models import HGRN2Config
from hgrn2.tasks import find_task
from hgrn2.tasks.registry import make_options
from hgrn2.train.runs import start_task_run
from hgrn2.train.settings import RunSettings

MIXERS = {
    "hgrn2": {},
    "hgrn1": {"layers": ["hgrn1"]},
    "attention": {"layers": ["attention"], "mixers": {"attention": {"num_heads": 4}}},
    "mamba": {"layers": ["mamba"]},
}


def configured(model: dict[str, Any], mixer: str, task: Any, options: Any) -> HGRN2Config:
    """Return the configuration with a mixer, whose channel mixer makes the parameters equal HGRN2's."""
    own = {**model, **task.model_settings(options)}
    base = HGRN2Config(**own)
    if mixer == "hgrn2":
        return base

    def size(config: HGRN2Config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in task.build_model(options, config).parameters())

    wanted = size(base)
    config = HGRN2Config(**(own | MIXERS[mixer]))
    sizes = range(8, 4 * base.hidden_size + 1, 8)
    return min((config.replace(intermediate_size=n) for n in sizes), key=lambda c: abs(size(c) - wanted))


class Lines:
    """A display that writes validations to a file, and a line every half minute to standard output."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about, self._last_s = path, about, 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Print a step now and then."""
        if time.monotonic() - self._last_s > 30:
            self._last_s = time.monotonic()
            shown = {k: record.get(k) for k in ("step", "loss", "accuracy", "elapsed_s", "grad_norm")}
            print(self._about["mixer"], shown, f"{progress:.0%}", flush=True)

    def validation(self, record: dict[str, Any]) -> None:
        """Append a validation."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._about | record) + "\n")
        shown = {k: round(v, 4) for k, v in record.items() if k.startswith("val_") and isinstance(v, float)}
        print(self._about["mixer"], record["step"], round(record["elapsed_s"]), shown, flush=True)

    def sample(self, record: dict[str, Any]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Print a line."""
        print(self._about["mixer"], text, flush=True)


def main() -> None:
    """Train in turn, or start one process a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--mixers", default="hgrn2,hgrn1,attention,mamba")
    parser.add_argument("--out", type=Path, default=Path("runs/lra"))
    parser.add_argument("--limit", type=float, help="seconds of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="model.KEY=VALUE, task.KEY=VALUE or train.KEY=VALUE")
    found = parser.parse_args()
    mixers = found.mixers.split(",")
    count = torch.cuda.device_count()
    found.out.mkdir(parents=True, exist_ok=True)
    if len(mixers) > 1 and count > 1:
        running: list[subprocess.Popen[bytes]] = []
        arguments = sys.argv[1:]
        for index, mixer in enumerate(mixers):
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(index % count)}
            running.append(subprocess.Popen([sys.executable, __file__, *arguments, "--mixers", mixer], env=environment))
        sys.exit(max(process.wait() for process in running))
    with found.file.open("rb") as file:
        tables = tomllib.load(file)
    for text in found.set:
        key, _, value = text.partition("=")
        table, _, name = key.partition(".")
        try:
            tables[table][name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            tables[table][name] = {"true": True, "false": False}.get(value, value)
    task = find_task(tables["task"].pop("name"))
    options = make_options(task, tables["task"])
    train = tables["train"] | {"seed": found.seed, "report": False}
    if found.limit is not None:
        train["max_time_s"] = found.limit
    for mixer in mixers:
        config = configured(tables["model"], mixer, task, options)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in task.build_model(options, config).parameters())
        about = {"task": task.name, "mixer": mixer, "seed": found.seed, "parameters": parameters}
        print(about, config, flush=True)
        settings = RunSettings.from_flat(train, task.name, tables["task"])
        run = found.out / f"{task.name}-{mixer}-seed{found.seed}"
        shutil.rmtree(run, ignore_errors=True)
        display = Lines(found.out / f"{task.name}.jsonl", about)
        try:
            start_task_run(run, config, settings, display=display)
        except Exception as error:
            # the other mixers still run
            print(mixer, "failed:", repr(error)[:600], flush=True)


if __name__ == "__main__":
    main()
