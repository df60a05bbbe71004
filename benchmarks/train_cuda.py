"""Training on a GPU through the same code as `hgrn2 train`, and peers that train a model of the same size.

Each model trains in a process of its own, on random tokens, until it has written the records of its steps; then it is
killed. Times are those of metrics.jsonl, the first step's is counted from the start of the process.

    python benchmarks/train_cuda.py --out benchmarks/results/train-h200.json
    python benchmarks/train_cuda.py --profile 150m
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import numpy as np
import torch
from report import Row, compare, report

# steps after the first ones, which compile and warm up
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Case:
    """A model and the batches it trains on.

    Attributes:
        preset: of `hgrn2.models.presets`.
        batch_size: sequences of a step.
        seq_len: tokens of a sequence.
        vocab_size: None for the preset's.
        steps: that are recorded.
        compiled: with torch.compile.
        cuda_graph: with steps captured in CUDA graphs.
    """

    preset: str
    batch_size: int
    seq_len: int
    vocab_size: int | None = None
    steps: int = 60
    compiled: bool = True
    cuda_graph: bool = False

    @property
    def name(self) -> str:
        """Name of the case in the tables."""
        kind = "compiled" if self.compiled else "eager"
        return f"{self.preset}, {self.batch_size} x {self.seq_len}, {kind}{' in a graph' if self.cuda_graph else ''}"


CASES = {
    "44m": Case("wikitext-44m", 64, 512, 16384, 120),
    "44m-graph": Case("wikitext-44m", 64, 512, 16384, 120, cuda_graph=True),
    "44m-eager": Case("wikitext-44m", 64, 512, 16384, 60, False),
    "150m": Case("150m", 16, 2048, None, 60),
    "150m-eager": Case("150m", 16, 2048, None, 40, False),
    "1.3b": Case("1.3b", 8, 2048, None, 30),
    "1.3b-eager": Case("1.3b", 8, 2048, None, 25, False),
}
PEERS = ("llama", "fla")


def train(case: Case, folder: Path, display: Any = None) -> None:
    """Train in this process, as `hgrn2 train` does; a display other than the usual one is told of every step."""
    from hgrn2.data.encode import EncodedPiece
    from hgrn2.data.prepared import PreparedData
    from hgrn2.data.tokenizer import ByteTokenizer
    from hgrn2.data.tokens import TokenDataset, token_dtype
    from hgrn2.data.writer import TokenWriter
    from hgrn2.models import presets
    from hgrn2.train.runs import start_language_run

    config = presets.preset(case.preset, **({} if case.vocab_size is None else {"vocab_size": case.vocab_size}))
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = config.vocab_size
    datasets = {}
    generator = np.random.default_rng(0)
    for side, documents in (("train", 2000), ("validation", 4)):
        writer = TokenWriter(folder / side, tokenizer)
        for _ in range(documents):
            tokens = generator.integers(config.vocab_size, size=4000).astype(token_dtype(config.vocab_size))
            writer.add(EncodedPiece(tokens, 16000), True)
        writer.close()
        datasets[side] = TokenDataset.open(folder / side, verify=False)
    data = PreparedData(folder, datasets["train"], datasets["validation"], tokenizer, {})
    settings = {
        "max_steps": 10**6, "batch_size": case.batch_size, "seq_len": case.seq_len, "precision": "bfloat16",
        "compile": case.compiled, "cuda_graph": case.cuda_graph, "validation_every": 0, "checkpoint_every": 0,
        "learning_rate": 1e-4,
    }  # fmt: skip
    start_language_run(folder / "run", config, settings, data, data_settings={}, display=display)


def profile(case: Case, steps: int = 4, warmup_steps: int = 20) -> None:
    """Print the kernels of a step by time, and how long the step takes without the profiler."""
    from hgrn2.train.display import SilentDisplay

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    class ProfilingDisplay(SilentDisplay):
        def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
            step = record["step"]
            if step == warmup_steps // 2:
                torch.cuda.synchronize()
                self.started_s = time.perf_counter()
            elif step == warmup_steps:
                torch.cuda.synchronize()
                self.step_ms = (time.perf_counter() - self.started_s) / (warmup_steps - warmup_steps // 2) * 1e3
                profiler.start()
            elif step == warmup_steps + steps:
                torch.cuda.synchronize()
                profiler.stop()
                show(self.step_ms)
                raise SystemExit

    def show(step_ms: float) -> None:
        times: dict[str, list[float]] = {}
        for event in profiler.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:  # pyright: ignore[reportPrivateImportUsage]
                times.setdefault(event.name, []).append(event.device_time)
        total_ms = sum(map(sum, times.values())) / steps / 1e3
        print(f"{case.name}: {step_ms:.2f} ms a step, of which {total_ms:.2f} in {len(times)} kernels")
        for name, found in sorted(times.items(), key=lambda item: -sum(item[1]))[:40]:
            share, count = sum(found) / steps / 1e3, len(found) / steps
            print(f"{share:9.3f} ms  {count:7.1f} x {share / count * 1e3:8.1f} us  {name[:120]}")

    with tempfile.TemporaryDirectory() as folder:
        train(case, Path(folder), ProfilingDisplay())


def train_peer(name: str, folder: Path) -> None:
    """Train fla's HGRN2 or transformers' Llama of the 1.3B size, weights in bfloat16, fused AdamW, 8 x 2048."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632,
        "use_cache": False, "tie_word_embeddings": False,
    }  # fmt: skip
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

        config = LlamaConfig(**size | {"num_attention_heads": 16, "attn_implementation": "sdpa"})
        kind: Any = LlamaForCausalLM
    else:
        from fla.models import HGRN2Config, HGRN2ForCausalLM  # pyright: ignore[reportMissingImports]

        config, kind = HGRN2Config(**size, expand_ratio=128), HGRN2ForCausalLM
    with torch.device("cuda"):
        model = kind(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run = folder / "run"
    run.mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, 41):
            started_s = time.monotonic()
            ids = torch.randint(32000, (8, 2048), device="cuda")
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_value = loss.item()
            rate = ids.numel() / (time.monotonic() - started_s)
            memory = torch.cuda.max_memory_allocated()
            record = {"kind": "train", "step": step, "loss": loss_value, "tokens_per_s": rate, "memory_bytes": memory}
            print(json.dumps(record), file=file, flush=True)


def measure(name: str, limit_s: float) -> tuple[list[dict], float | None, str]:
    """Run a case in a process of its own.

    Returns:
        Its records, seconds from its start to the first one, and what it printed if it ended by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = CASES[name].steps if name in CASES else 25
        log = Path(folder) / "log"
        started_s = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, __file__, "--child", name, "--folder", folder], stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        first_s, records = None, []
        path = Path(folder) / "run" / "metrics.jsonl"
        while child.poll() is None and time.monotonic() - started_s < limit_s and len(records) < steps:
            time.sleep(0.05)
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
                if records and first_s is None:
                    first_s = time.monotonic() - started_s
        ended = child.poll() is not None
        if not ended:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return records, first_s, log.read_text(errors="replace")[-1500:] if ended else ""


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    names = [*CASES, *PEERS]
    default = ["44m", "44m-graph", "150m", "1.3b", *PEERS]
    parser.add_argument("--cases", nargs="+", choices=names, default=default)
    parser.add_argument("--limit-s", type=float, default=150, help="of one case")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--profile", choices=CASES, help="print the kernels of a step by time, and nothing else")
    parser.add_argument("--child", choices=[*CASES, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        profile(CASES[options.profile])
        return 0
    if options.child:
        if options.child in CASES:
            train(CASES[options.child], options.folder)
        else:
            train_peer(options.child, options.folder)
        return 0
    rows: list[Row] = []
    peers = {"llama": "Llama (transformers, sdpa), 1.3B, 8 x 2048", "fla": "fla's HGRN2, 1.3B, 8 x 2048"}
    for name in options.cases:
        shown = CASES[name].name if name in CASES else peers[name]
        records, first_s, failure = measure(name, options.limit_s)
        rates = [r["tokens_per_s"] for r in records[WARMUP_STEPS:]]
        if not rates:
            rows.append(Row(shown, None, "tokens/s", note=f"no result: {' '.join(failure.split())[-300:]}"))
            print(failure, file=sys.stderr)
            continue
        note = (
            f"loss {records[0]['loss']:.4f} to {records[-1]['loss']:.4f}, {records[-1]['memory_bytes'] / 2**30:.1f} GiB"
        )
        rows.append(Row(shown, statistics.median(rates), "tokens/s", min(rates), max(rates), note=note))
        rows.append(Row(f"{shown}: start to first step", first_s, "s"))
        print(rows[-2], rows[-1], file=sys.stderr, flush=True)
    for peer in peers.values():
        for case in ("1.3b", "1.3b-eager"):
            compare(rows, CASES[case].name, peer)
    report("train_cuda", {"precision": "bfloat16", "warmup steps": WARMUP_STEPS}, rows, "cuda", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
