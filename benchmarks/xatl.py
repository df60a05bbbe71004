r"""A start from a Transformer against one from scratch: the same model and batches, validation loss against tokens.

    python benchmarks/xatl.py stories15m --data text/ --max-tokens 100000 --threads 1
    python benchmarks/xatl.py smollm2-135m --data train.jsonl --validation valid.jsonl --device cuda \
        --precision bfloat16 --max-tokens 16384000 --batch-size 16 --seq-len 1024 --validations 25 \
        --validation-tokens 131072 --learning-rate 3e-3 --scratch-learning-rate 1e-3 --unfreeze-every 25 \
        --distill none

The model is a folder as `pretrained.py` makes it. For each kind, all linear and a hybrid that keeps some attention,
two runs of `hgrn2 train` read the same batches in the same order: one from random weights, one from what
`hgrn2 convert --from-transformer` writes, with the copied weights frozen at first. "tokens to reach" is where the
second run's validation loss is first at or below the last one of the first run, as it was measured, not interpolated.
Held-out texts are cut into pieces of four characters a token of a training sequence, so that attention sees hardly a
place it has not learnt. Runs that are finished in --work are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import torch
from report import Row, arguments, report

from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData
from hgrn2.data.sources import open_corpus
from hgrn2.data.tokens import MANIFEST_FILE
from hgrn2.devices import choose_device
from hgrn2.errors import UserError
from hgrn2.formats.convert import convert
from hgrn2.formats.opening import open_folder
from hgrn2.formats.run_folder import read_config
from hgrn2.formats.start import parse_layers, start_from_transformer
from hgrn2.models import HGRN2Config
from hgrn2.tasks import TaskContext
from hgrn2.train.metrics import METRICS_NAME, read_metrics
from hgrn2.train.runs import start_language_run
from hgrn2.train.settings import RunSettings

# of a piece of held-out text, for each token of a sequence
CHARACTERS = 4
SCRATCH, START = "from scratch", "from the Transformer"
Curve = list[tuple[int, float]]


def tokens_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """Tokens of the first measured point at or below a loss; None if there is none."""
    return next((tokens for tokens, value in curve if value <= loss), None)


def cut(sources: Sequence[str], size: int, out: Path) -> Path:
    """Cut texts into pieces of so many characters, each a separate document."""
    lines = []
    for document in open_corpus(sources).documents():
        text = "".join(document.pieces)
        lines += [json.dumps({"text": text[start : start + size]}) + "\n" for start in range(0, len(text), size)]
    # a file that is as it was keeps its time, and what was prepared from it is used again
    if not out.exists() or out.read_text(encoding="utf-8") != "".join(lines):
        out.write_text("".join(lines), encoding="utf-8")
    return out


def is_there(run: Path, config: HGRN2Config, settings: RunSettings, data: PreparedData) -> bool:
    """Whether a run is there already, with these settings and this text.

    Raises:
        UserError: it is there with others, or is older than the text's tokens.
    """
    if not run.exists():
        return False
    found = read_config(run)
    train = settings.to_flat()
    if train.get("teacher") is not None:
        train["teacher"] = os.path.abspath(train["teacher"])
    wanted = json.loads(json.dumps({"model": config.to_dict(), "train": train}))
    changed = [key for table in wanted for key, value in wanted[table].items() if found[table].get(key) != value]
    if changed:
        raise UserError(
            f"{run}: a run with other settings ({', '.join(sorted(changed))}); remove it, or name a new --work"
        )
    if (run / METRICS_NAME).stat().st_mtime < (data.directory / MANIFEST_FILE).stat().st_mtime:
        raise UserError(f"{run}: older than the tokens in {data.directory}; remove it, or name a new --work")
    return True


def train(run: Path, config: HGRN2Config, settings: Mapping[str, Any], data: PreparedData, start: Path | None) -> Curve:
    """One run, unless it is there; its validation losses by tokens, and before that the first batch's at 0."""
    run_settings = RunSettings.from_flat(settings)
    if not is_there(run, config, run_settings, data):
        opened = None if start is None else open_folder(start)
        prepared = {"prepared": str(data.directory)}
        start_language_run(run, config, run_settings, data, data_settings=prepared, start=opened)
    records = read_metrics(run)
    # the loss of the first batch, before its step; close to the validation loss, and free
    curve = [(0, r["loss"]) for r in records if r["kind"] == "train"][:1]
    curve += [(r["tokens"], r["val_loss"]) for r in records if r["kind"] == "validation"]
    tokens, wanted = curve[-1][0] if curve else 0, run_settings.train.max_tokens or 0
    if tokens + run_settings.tokens_per_step <= wanted:
        raise UserError(f"{run}: ends after {tokens:,} of {wanted:,} tokens; remove it")
    return curve


def loss_of(model: Path, settings: Mapping[str, Any], data: PreparedData) -> float:
    """The Transformer's own validation loss, by our code and on the same held-out text."""
    run_settings = RunSettings.from_flat(settings)
    train = run_settings.train
    device = choose_device(train.device)
    task = run_settings.task.build(run_settings.options, TaskContext(train.batch_size, train.seed, device, data=data))
    with torch.no_grad():
        return task.evaluate(open_folder(model).load(device))["val_loss"]


def rows_of(kind: str, curves: Mapping[str, Curve]) -> list[Row]:
    """Return the results of one kind of model."""
    scratch, start = curves[SCRATCH], curves[START]
    rows = [Row(f"{kind}, {way}: validation loss", curve[-1][1], "nats/token") for way, curve in curves.items()]
    rows.append(Row(f"{kind}, {START}: loss of the first batch", start[0][1], "nats/token"))
    total, needed = scratch[-1][0], tokens_to_reach(start, scratch[-1][1])
    reached = Row(f"{kind}, {START}: tokens to reach {scratch[-1][1]:.3f}", needed, "tokens")
    if needed is None:
        reached.note = "not reached"
    else:
        reached.note = f"{needed / total:.0%} of the {total:,} of the run from scratch"
    return [*rows, reached]


def draw(curves: Mapping[str, Mapping[str, Curve]], original: float, title: str, out: Path) -> None:
    """One panel a kind, the Transformer's own loss as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (kind, ways) in zip(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items()):  # noqa: B905
        for (way, curve), colour in zip(ways.items(), ("#718096", "#2b6cb0", "#2f855a"), strict=False):
            # the first point is of a training batch
            axes.plot(*zip(*curve[1:], strict=True), color=colour, marker=".", label=way)
        axes.axhline(original, color="#c05621", linestyle="--", label="the Transformer itself")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set(title=kind, xlabel="training tokens", ylabel="validation loss, nats per token")
        axes.grid(color="#e4e4e4")
        axes.legend(frameon=False)
    figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> int:
    """Runs the experiment."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the Transformer")
    parser.add_argument("--data", nargs="+", required=True, help="text to train on")
    parser.add_argument("--validation", nargs="*", default=[], help="held-out text; unset: a part of the other, whole")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/xatl"),
        help="folder for data and runs; what is finished there is not repeated",
    )
    parser.add_argument("--prepared", type=Path, help="keep the tokens here, for further runs; unset: in --work")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="of each run")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the runs from the Transformer")
    parser.add_argument("--scratch-learning-rate", type=float, help="of those from scratch; unset: the same")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--validations", type=int, default=20, help="points of a curve")
    parser.add_argument("--kinds", nargs="+", default=["none", "every:4"], help="attention that is kept, for each kind")
    parser.add_argument("--unfreeze-every", type=int, default=10)
    parser.add_argument("--unfreeze-threshold", type=float, default=0.1)
    parser.add_argument("--unfrozen-lr-fraction", type=float, default=0.1)
    parser.add_argument(
        "--distill", nargs="*", default=[], help="kinds with a third run, which the Transformer teaches"
    )
    parser.add_argument("--no-copy-qv", action="store_true", help="new q and i projections as well")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if further := set(options.distill) - set(options.kinds):
        parser.error(f"--distill {' '.join(sorted(further))}: not among --kinds {' '.join(options.kinds)}")
    try:
        return measure(options)
    except UserError as error:
        parser.error(str(error))


def measure(options: argparse.Namespace) -> int:
    """All runs of all kinds, the table, the picture."""
    source = open_folder(options.model)
    options.work.mkdir(parents=True, exist_ok=True)
    prepared = options.prepared or options.work / "prepared"
    held_out = options.validation
    if held_out:
        prepared.parent.mkdir(parents=True, exist_ok=True)
        pieces = prepared.with_name(f"{prepared.name}-held-out.jsonl")
        held_out = [cut(held_out, CHARACTERS * options.seq_len, pieces)]
    data = prepare(options.data, str(options.model), prepared, validation=held_out, progress=False)
    steps = options.max_tokens // (options.batch_size * options.seq_len)
    common = {
        "max_tokens": options.max_tokens, "batch_size": options.batch_size, "seq_len": options.seq_len,
        "learning_rate": options.learning_rate, "precision": options.precision, "compile": options.compile,
        "device": options.device, "num_threads": options.threads, "checkpoint_every": 0, "keep_last": 1,
        "warmup_steps": min(100, steps // 10), "validation_every": max(1, steps // options.validations),
        "validation_tokens": options.validation_tokens,
    }  # fmt: skip
    staged = {
        "freeze": "copied", "unfreeze_every": options.unfreeze_every, "unfreeze_threshold": options.unfreeze_threshold,
        "unfrozen_lr_fraction": options.unfrozen_lr_fraction,
    }  # fmt: skip
    scratch_rate = options.scratch_learning_rate or options.learning_rate
    original = loss_of(options.model, common, data)
    rows = [Row("the Transformer itself: validation loss", original, "nats/token")]
    curves: dict[str, dict[str, Curve]] = {}
    for kept in options.kinds:
        layers = parse_layers(kept, source.config.num_hidden_layers)
        start = start_from_transformer(source, keep_attention=layers, copy_qv=not options.no_copy_qv)
        kind = f"{len(layers)} of {source.config.num_hidden_layers} layers attend" if layers else "all linear"
        name = kept.replace(":", "-").replace(",", "-")
        folder = options.work / f"start-{name}"
        if not folder.exists():
            convert(start, folder, "hf", tokenizer_dir=options.model)
        ways: dict[str, tuple[dict[str, Any], Path | None]] = {
            SCRATCH: ({"learning_rate": scratch_rate}, None), START: (staged, folder)
        }  # fmt: skip
        if kept in options.distill:
            ways[f"{START}, which teaches"] = (staged | {"teacher": str(options.model)}, folder)
        curves[kind] = {
            way: train(options.work / f"{name}-{i}", start.config, common | further, data, first)
            for i, (way, (further, first)) in enumerate(ways.items())
        }
        rows += rows_of(kind, curves[kind])
    settings = {
        "model": options.model.name, "parameters": sum(source.spec(name).numel() for name in source.names),
        "tokens of a run": options.max_tokens, "tokens per step": options.batch_size * options.seq_len,
        "sequence": options.seq_len, "learning rate": options.learning_rate,
        "learning rate from scratch": scratch_rate, "q and v copied": not options.no_copy_qv,
        "unfreeze every": options.unfreeze_every, "unfreeze threshold": options.unfreeze_threshold,
        "learning rate of copied weights": float(f"{options.learning_rate * options.unfrozen_lr_fraction:.4g}"),
        "precision": options.precision,
        "held-out tokens": options.validation_tokens, "data": " ".join(Path(name).name for name in options.data),
        "held-out data": " ".join(Path(name).name for name in options.validation) or "a part of the data",
    }  # fmt: skip
    report("xatl", settings, rows, options.device, options.out, {"curves": curves})
    if options.picture is not None:
        draw(curves, original, f"{options.model.name}, {options.max_tokens:,} tokens a run", options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
