"""Training on a GPU through the same code as `hgrn2 train`, and peers that train a model of the same size.

Each model trains in a separate process, on random tokens, until it has written the records of its steps; then it is
killed. Times are those of metrics.jsonl, the first step's is counted from the start of the process.

    python benchmarks/train_cuda.py --out benchmarks/results/train-h200.json
    python benchmarks/train_cuda.py --mixers --out benchmarks/results/train-mixers-h200.json
    python benchmarks/train_cuda.py --profile 150m

--mixers takes every mixer at the 44M shape, and a peer where fla or transformers has the model; only the tokens a
second of such models are compared, whose other layers are those of HGRN2's preset or of the library.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
        mixer: in every layer, or None for the preset's.
        options: of the mixer.
    """

    preset: str
    batch_size: int
    seq_len: int
    vocab_size: int | None = None
    steps: int = 60
    compiled: bool = True
    cuda_graph: bool = False
    mixer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the case in the tables."""
        kind = "compiled" if self.compiled else "eager"
        options = "".join(f" {value}" for value in self.options.values() if isinstance(value, str))
        mixer = "" if self.mixer is None else f"{self.mixer}{options}, "
        graph = " in a graph" if self.cuda_graph else ""
        return f"{mixer}{self.preset}, {self.batch_size} x {self.seq_len}, {kind}{graph}"


CASES = {
    "44m": Case("wikitext-44m", 64, 512, 16384, 120),
    "44m-graph": Case("wikitext-44m", 64, 512, 16384, 120, cuda_graph=True),
    "44m-eager": Case("wikitext-44m", 64, 512, 16384, 60, False),
    "150m": Case("150m", 16, 2048, None, 60),
    "150m-eager": Case("150m", 16, 2048, None, 40, False),
    "1.3b": Case("1.3b", 8, 2048, None, 30),
    "1.3b-eager": Case("1.3b", 8, 2048, None, 25, False),
}
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hgrn2": ("hgrn2", {}),
    "hgrn1": ("hgrn1", {}),
    "hgrn1-real": ("hgrn1", {"form": "real"}),
    "attention": ("attention", {"num_heads": 8}),
    "mamba": ("mamba", {}),
    "griffin": ("griffin", {}),
    "rwkv5": ("rwkv5", {}),
    "rwkv6": ("rwkv6", {}),
    "gla": ("gla", {}),
    "rebased": ("rebased", {}),
}
# every mixer at the 44M shape, in a graph as `hgrn2 compare` trains
CASES |= {
    f"44m-{name}": Case("wikitext-44m", 64, 512, 16384, 60, cuda_graph=True, mixer=mixer, options=options)
    for name, (mixer, options) in MIXERS.items()
}


@dataclass(frozen=True)
class Peer:
    """A model of another library, weights in bfloat16, fused AdamW.

    Attributes:
        name: in the tables.
        library: that is imported.
        kind: prefix of its classes.
        keys: of its configuration, beside the sizes.
        is_small: the 44M shape, otherwise 1.3B at 8 x 2048.
        ours: case that it is compared with.
    """

    name: str
    library: str
    kind: str
    keys: dict[str, Any]
    is_small: bool = True
    ours: str = ""


_SDPA = {"attn_implementation": "sdpa"}
PEERS = {
    "llama": Peer("Llama (transformers, sdpa)", "transformers", "Llama", {"num_attention_heads": 16} | _SDPA, False),
    "fla": Peer("fla's HGRN2", "fla.models", "HGRN2", {"expand_ratio": 128}, False),
}
SMALL_PEERS = {
    "fla-hgrn2": Peer("fla's HGRN2", "fla.models", "HGRN2", {"expand_ratio": 128}, ours="44m-hgrn2"),
    "fla-hgrn": Peer("fla's HGRN", "fla.models", "HGRN", {}, ours="44m-hgrn1-real"),
    "fla-gla": Peer("fla's GLA", "fla.models", "GLA", {"num_heads": 4}, ours="44m-gla"),
    "fla-rwkv6": Peer("fla's RWKV6", "fla.models", "RWKV6", {"num_heads": 8, "expand_k": 1.0}, ours="44m-rwkv6"),
    "llama-44m": Peer(
        "Llama (transformers, sdpa)", "transformers", "Llama", {"num_attention_heads": 8} | _SDPA, ours="44m-attention"
    ),
    "mamba-44m": Peer(
        "Mamba (transformers, mambapy)", "transformers", "Mamba", {"use_mambapy": True, "num_hidden_layers": 12},
        ours="44m-mamba",
    ),
    "griffin-44m": Peer(
        "RecurrentGemma (transformers)", "transformers", "RecurrentGemma",
        {"num_attention_heads": 8, "lru_width": 512, "block_types": ["recurrent"], "intermediate_size": 2 * 1368},
        ours="44m-griffin",
    ),
}  # fmt: skip
ALL_PEERS = PEERS | SMALL_PEERS


def train(case: Case, folder: Path, display: Any = None) -> None:
    """Train in this process, as `hgrn2 train` does; a display other than the usual one is told of every step."""
    from hgrn2.data.encode import EncodedPiece
    from hgrn2.data.prepared import PreparedData
    from hgrn2.data.tokenizer import ByteTokenizer
    from hgrn2.data.tokens import TokenDataset, token_dtype
    from hgrn2.data.writer import TokenWriter
    from hgrn2.models import presets
    from hgrn2.train.runs import start_language_run

    keys: dict[str, Any] = {} if case.vocab_size is None else {"vocab_size": case.vocab_size}
    if case.mixer is not None and case.mixer != "hgrn2":
        keys |= {"layers": (case.mixer,), "mixers": {case.mixer: case.options} if case.options else {}}
    config = presets.preset(case.preset, **keys)
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


def train_peer(peer: Peer, folder: Path) -> None:
    """Train a model of another library."""
    torch.manual_seed(0)
    if peer.is_small:
        shape, sizes = (64, 512), (16384, 512, 6, 1368)
    else:
        shape, sizes = (8, 2048), (32000, 2048, 24, 5632)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    size: dict[str, Any] = dict(zip(names, sizes, strict=True))
    size |= {"use_cache": False, "tie_word_embeddings": peer.is_small}
    if peer.kind == "Mamba":
        # its width inside a layer
        del size["intermediate_size"]
    library = importlib.import_module(peer.library)
    config = getattr(library, f"{peer.kind}Config")(**size | peer.keys)
    kind: Any = getattr(library, f"{peer.kind}ForCausalLM")
    with torch.device("cuda"):
        model = kind(config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run = folder / "run"
    run.mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, 41):
            started_s = time.monotonic()
            ids = torch.randint(sizes[0], shape, device="cuda")
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_value = loss.item()
            rate = ids.numel() / (time.monotonic() - started_s)
            memory = torch.cuda.max_memory_allocated()
            record = {"kind": "train", "step": step, "loss": loss_value, "tokens_per_s": rate, "memory_bytes": memory}
            print(json.dumps(record), file=file, flush=True)


class Child:
    """A case in a separate process.

    Args:
        name: of the case.
        folder: for its files.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.started_s = name, folder, time.monotonic()
        self.first_s: float | None = None
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("wb") as output:
            command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def records(self) -> list[dict[str, Any]]:
        """The records of its steps so far."""
        path = self.folder / "run" / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [r for r in map(json.loads, lines) if r["kind"] == "train"]
        if found and self.first_s is None:
            self.first_s = time.monotonic() - self.started_s
        return found

    def wait(self, steps: int, deadline: float) -> bool:
        """Wait for so many steps; False if it ended or time is over."""
        while len(self.records()) < steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def send(self, number: int) -> None:
        """Send a signal to it and the processes that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> str:
        """Kill it; return what it printed if it ended by itself."""
        ended = self.process.poll() is not None
        self.send(signal.SIGKILL)
        self.process.wait()
        return (self.folder / "log").read_text(errors="replace")[-1500:] if ended else ""


def measure(name: str, limit_s: float) -> tuple[list[dict], float | None, str]:
    """Run a case.

    Returns:
        Its records, seconds from its start to the first one, and what it printed if it ended by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = Child(name, Path(folder))
        child.wait(CASES[name].steps if name in CASES else 25, time.monotonic() + limit_s)
        failure = child.end()
        return child.records(), child.first_s, failure


def measure_in_turn(names: list[str], limit_s: float, warm_s: float) -> Iterator[tuple[str, list[dict], str]]:
    """Compile cases side by side; each is stopped once it is warm, and then continues alone.

    Yields:
        Name, records of the steps that it ran alone, and what it printed if it ended by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(name, Path(folder) / name) for name in names]
        try:
            waiting, deadline = set(children), time.monotonic() + warm_s
            while waiting and time.monotonic() < deadline:
                for child in list(waiting):
                    if child.process.poll() is not None or len(child.records()) >= 3:
                        child.send(signal.SIGSTOP)
                        waiting.remove(child)
                time.sleep(0.02)
            for child in waiting:
                child.send(signal.SIGSTOP)
            print(f"compiled; not yet warm: {[child.name for child in waiting]}", file=sys.stderr, flush=True)
            for child in children:
                before = len(child.records())
                child.send(signal.SIGCONT)
                child.wait(
                    before + (CASES[child.name].steps if child.name in CASES else 25), time.monotonic() + limit_s
                )
                failure = child.end()
                yield child.name, child.records()[before:], failure
        finally:
            for child in children:
                child.end()


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    names = [*CASES, *ALL_PEERS]
    default = ["44m", "44m-graph", "150m", "1.3b", *PEERS]
    parser.add_argument("--cases", nargs="+", choices=names, default=default)
    parser.add_argument("--mixers", action="store_true", help="every mixer at the 44M shape, and peers")
    parser.add_argument("--limit-s", type=float, default=150, help="of one case")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--profile", choices=CASES, help="print the kernels of a step by time, and nothing else")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        profile(CASES[options.profile])
        return 0
    if options.child:
        if options.child in CASES:
            train(CASES[options.child], options.folder)
        else:
            train_peer(ALL_PEERS[options.child], options.folder)
        return 0
    rows: list[Row] = []
    peers = {
        name: f"{peer.name}, {'44M, 64 x 512' if peer.is_small else '1.3B, 8 x 2048'}"
        for name, peer in ALL_PEERS.items()
    }
    for name, records, first_s, failure in _results(options):
        shown = CASES[name].name if name in CASES else peers[name]
        rates = [r["tokens_per_s"] for r in records[WARMUP_STEPS:]]
        if not rates:
            rows.append(Row(shown, None, "tokens/s", note=f"no result: {' '.join(failure.split())[-300:]}"))
            print(name, failure, file=sys.stderr)
        else:
            memory = records[-1]["memory_bytes"] / 2**30
            note = f"loss {records[0]['loss']:.4f} to {records[-1]['loss']:.4f}, {memory:.1f} GiB"
            rows.append(Row(shown, statistics.median(rates), "tokens/s", min(rates), max(rates), note=note))
            print(rows[-1], file=sys.stderr, flush=True)
            if first_s is not None:
                rows.append(Row(f"{shown}: start to first step", first_s, "s"))
        if options.out:
            options.out.with_suffix(".partial.json").write_text(json.dumps([vars(row) for row in rows]))
    for name, peer in ALL_PEERS.items():
        for case in (peer.ours,) if peer.is_small else ("1.3b", "1.3b-eager"):
            compare(rows, CASES[case].name, peers[name])
    report("train_cuda", {"precision": "bfloat16", "warmup steps": WARMUP_STEPS}, rows, "cuda", options.out)
    return 0


def _results(options: argparse.Namespace) -> Iterator[tuple[str, list[dict], float | None, str]]:
    """Yield name, records, seconds to the first step (None if others ran beside it) and failure of each case."""
    if not options.mixers:
        for name in options.cases:
            yield name, *measure(name, options.limit_s)
        return
    # both groups fit the memory of one GPU
    for names in ([f"44m-{mixer}" for mixer in MIXERS], list(SMALL_PEERS)):
        for name, records, failure in measure_in_turn(names, min(options.limit_s, 15), 110):
            yield name, records, None, failure


if __name__ == "__main__":
    sys.exit(main())
