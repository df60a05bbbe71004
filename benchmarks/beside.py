"""Two runs at once on one machine, and `hgrn2 generate` beside a run, against each alone.

python benchmarks/beside.py --out benchmarks/results/beside-cpu.json

"sleeping" is how the command runs (OMP_WAIT_POLICY=passive), "spinning" is OpenMP's own way, asked for by name
(GOMP_SPINCOUNT=300000). A run's steps per second come from its own records, first step left out; generate's are those
of the whole command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environment  # noqa: F401  (before torch)
from report import Row, arguments, compare, report, row

from hgrn2.train.metrics import METRICS_NAME, read_metrics

ROOT = Path(__file__).resolve().parent.parent
WAITING = {"sleeping": {"OMP_WAIT_POLICY": "passive"}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
TINY = (
    "--data stdlib --tokenizer bytes --model tiny --batch-size 4 --seq-len 64 --validation-tokens 2000 --set "
    "hidden_size=64 expand_ratio=32 num_hidden_layers=2 intermediate_size=128"
)
DEMO = f"--config {ROOT / 'examples' / 'demo.toml'} --validation-tokens 2000 --warmup-steps 1"
SIZES = {"tiny": TINY, "demo": DEMO}


def start_command(words: list[str], waiting: str) -> subprocess.Popen[bytes]:
    """Start `hgrn2` with these words, quietly."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    path = os.pathsep.join([str(ROOT / "src"), env.get("PYTHONPATH", "")])
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "hgrn2", *words],
        env=env | WAITING[waiting] | {"PYTHONPATH": path},
        stdout=quiet,
        stderr=quiet,
    )


def start_run(size: str, steps: int, out: Path, waiting: str) -> subprocess.Popen[bytes]:
    """Start a training run."""
    return start_command(["train", *SIZES[size].split(), "--max-steps", str(steps), "--out", str(out)], waiting)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command; stop the benchmark if it failed."""
    if process.wait():
        sys.exit(f"{process.args} failed with status {process.returncode}")


def steps_per_s(out: Path) -> float:
    """Steps a second of a finished run."""
    steps = [record for record in read_metrics(out / METRICS_NAME) if record["kind"] == "train"]
    return (len(steps) - 1) / (steps[-1]["elapsed_s"] - steps[0]["elapsed_s"])


def runs_at_once(size: str, steps: int, number: int, folder: Path, waiting: str) -> list[float]:
    """Steps a second of each of several runs."""
    outs = [Path(tempfile.mkdtemp(dir=folder)) / "run" for _ in range(number)]
    processes = [start_run(size, steps, out, waiting) for out in outs]
    for process in processes:
        finish(process)
    return [steps_per_s(out) for out in outs]


def generate_s(run: Path, waiting: str) -> float:
    """Seconds of a command that writes 200 tokens."""
    start = time.perf_counter()
    finish(start_command(["generate", str(run), "--prompt", "def", "--max-tokens", "200", "--seed", "1"], waiting))
    return time.perf_counter() - start


def main() -> int:
    """Run the benchmark."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--waiting", nargs="+", choices=WAITING, default=list(WAITING))
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in options.sizes:
            found: dict[str, list[float]] = {}
            written: dict[str, list[float]] = {}
            model = folder / f"{size}-model" / "run"
            finish(start_run(size, 2, model, "sleeping"))
            for _ in range(options.rounds):
                for waiting in options.waiting:
                    alone = runs_at_once(size, options.steps, 1, folder, waiting)
                    pair = runs_at_once(size, options.steps, 2, folder, waiting)
                    found.setdefault(f"{size}, {waiting}: a run alone", []).extend(alone)
                    found.setdefault(f"{size}, {waiting}: each of two", []).append(min(pair))
                    written.setdefault(f"{size}, {waiting}: generate alone", []).append(generate_s(model, waiting))
                    other = start_run(size, 100 * options.steps, Path(tempfile.mkdtemp(dir=folder)) / "run", waiting)
                    # until it has begun to train
                    time.sleep(10)
                    seconds = generate_s(model, waiting)
                    written.setdefault(f"{size}, {waiting}: generate beside a run", []).append(seconds)
                    other.kill()
                    other.wait()
            rows += [row(name, values, "steps/s") for name, values in found.items()]
            rows += [row(name, values, "s") for name, values in written.items()]
            for waiting in options.waiting:
                compare(rows, f"{size}, {waiting}: each of two", f"{size}, {waiting}: a run alone")
                compare(rows, f"{size}, {waiting}: generate beside a run", f"{size}, {waiting}: generate alone")
    report("beside", {"steps": options.steps, "rounds": options.rounds}, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
