"""Time `hgrn2 train` in one process and in several, with every way to share the work.

Each run is the command itself, on the source code of Python's standard library; its rate is the median of the records
after the first quarter of the steps. The batch grows with the number of processes, except where they share a sequence.

    python benchmarks/train_gpus.py --gpus 2 --model 1.3b --seq-len 2048 --batch-size 8
    python benchmarks/train_gpus.py --gpus 2 --device cpu --model tiny --seq-len 128 --batch-size 2 --steps 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "data parallel": [],
    "shard, weights kept": ["--shard", "--no-reshard"],
    "shard": ["--shard"],
    "shard, activations recomputed": ["--shard", "--activation-checkpointing"],
}


def rate(out: Path, arguments: list[str]) -> tuple[float, float]:
    """Return the tokens/s of a run, and its peak memory in GiB on the main process."""
    command = [sys.executable, "-m", "hgrn2", "train", "--out", str(out), "--no-report", "--validation-every", "0"]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    settled = records[len(records) // 4 :]
    return statistics.median(r["tokens_per_s"] for r in settled), settled[-1]["memory_bytes"] / 2**30


def main() -> None:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="1.3b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences on each GPU")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", default="bfloat16")
    given = parser.parse_args()
    common = [
        "--model", given.model, "--device", given.device, "--seq-len", str(given.seq_len), "--max-steps",
        str(given.steps), "--precision", given.precision, "--validation-tokens", "1024",
    ]  # fmt: skip
    print("| processes | way | tokens/s | of one process, each | GiB |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        size = str(given.batch_size)
        one, memory = rate(place / "one", [*common, "--batch-size", size, "--processes", "1"])
        print(f"| 1 | | {one:,.0f} | 1.00 | {memory:.1f} |", flush=True)
        several = str(given.gpus)
        runs = {name: ["--batch-size", str(given.batch_size * given.gpus), *flags] for name, flags in WAYS.items()}
        # the same tokens on each GPU: sequences are longer, and every GPU has a piece of each
        longer = ["--seq-len", str(given.seq_len * given.gpus), "--batch-size", size, "--context-parallel", several]
        runs["context parallel"] = longer
        for number, (name, flags) in enumerate(runs.items()):
            found, memory = rate(place / str(number), [*common, *flags, "--processes", several])
            print(f"| {several} | {name} | {found:,.0f} | {found / one / given.gpus:.2f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
