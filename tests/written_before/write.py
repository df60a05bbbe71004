"""Writes this folder: a run, its prepared tokens, a state file, a folder of each layout, 30 losses and some logits.

The files in the repository were written by commit 33b8316, before rooms and names changed. They stay as they are; tests
open them with the code of today. To write them again, in an empty folder: PYTHONPATH=<a checkout>/src python write.py
"""

import contextlib
import io
import json
import random
import shutil
import sys
from pathlib import Path

import torch

from hgrn2 import HGRN2LM, cli
from hgrn2.train import plots

LAYOUTS = {"hf": "run", "fla": "run", "native": "run", "official": "plain"}
SIZE = ["hidden_size=16", "num_hidden_layers=2", "expand_ratio=8", "intermediate_size=24", "initializer_range=0.1"]
HYBRID = ["use_short_conv=true", 'attn={"layers":[1],"num_heads":2,"num_kv_heads":1,"window_size":20}']
# what the published code of the official layout fixes
OFFICIAL = [
    "scale=1.0", "glu_activation=none", "mixer_norm_eps=1e-6", "mixer_norm_affine=false", "elementwise_affine=false",
    "min_log_decay=-3",
]  # fmt: skip
FLAGS = [
    "--data", "text", "--tokenizer", "bytes", "--prepared", "prepared", "--max-steps", "30", "--batch-size", "2",
    "--seq-len", "32", "--validation-every", "0", "--validation-tokens", "300", "--checkpoint-every", "15",
    "--device", "cpu", "--num-threads", "1", "--seed", "5", "--learning-rate", "3e-3",
]  # fmt: skip
IDS = list(b"a text of some bytes, as long as the window and more")
PROMPT = ["--max-tokens", "12", "--temperature", "0", "--device", "cpu"]


def command(*words):
    assert cli.main(words) == 0, words


def main():
    plots.plot_run = lambda *args, **kwargs: []
    draw = random.Random(7)
    Path("text").mkdir()
    for i in range(16):
        (Path("text") / f"{i}.txt").write_text("".join(draw.choice("abcde ") for _ in range(draw.randint(20, 300))))
    command("train", "--out", "run", *FLAGS, "--set", *SIZE, *HYBRID)
    command("train", "--out", "plain", *FLAGS, "--set", *SIZE, *OFFICIAL)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    figures = {"losses": [r["loss"] for r in records if r["kind"] == "train"], "ids": IDS, "logits": {}}
    # a run that was stopped half way
    shutil.rmtree("run/checkpoints/step-00000030")
    for file in ("report.html", "gates.npz", ".lock"):
        Path("run", file).unlink(missing_ok=True)
    command("generate", "run", "--prompt", "a text of ", *PROMPT, "--state-out", "state.safetensors")
    with contextlib.redirect_stdout(io.StringIO()) as text:
        command("generate", "run", "--prompt", "bytes", *PROMPT, "--state-in", "state.safetensors")
    figures["continued"] = text.getvalue()
    for layout, run in LAYOUTS.items():
        command("convert", run, layout, "--to", layout)
    for folder in ("run", *LAYOUTS):
        model = HGRN2LM.load(folder, device="cpu")
        with torch.no_grad():
            logits, _ = model(torch.tensor([IDS]))
        figures["logits"][folder] = logits[0, -1, :8].tolist()
    Path("figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree("plain")


if __name__ == "__main__":
    sys.exit(main())
