"""Times the layer of every mixer at the width of the 1.3B model beside public implementations, on a GPU.

Forward + backward in bfloat16 at 8 x 2048 tokens, gradients of the input and of every parameter. Ours and the peers of
transformers run eagerly and under torch.compile, those of fla eagerly, and the fastest counts. Every mixer has a
process of its own: all of them compile side by side, then each is timed alone; one that fails leaves a row with the
reason. Outputs and gradients must be finite. Peers have their own weights: tests compare our mixers with them, or with
transcriptions.

    python benchmarks/rival_layers.py --out benchmarks/results/rival-layers-h200.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (before torch)
import torch
from report import Row, arguments, report
from torch import Tensor, nn

from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.parameters import InitialValues

D, BATCH, LENGTH = 2048, 8, 2048
DTYPE = torch.bfloat16
Layer = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]
# calls in a row, and the time that a candidate may take
CALLS, ROUNDS, BUDGET_S = 10, 5, 4.0


def ours(name: str, **options: Any) -> Callable[[], Layer]:
    """Our mixer, with the lower bound of a middle layer."""

    def make() -> Layer:
        found = find_mixer(name)
        mixer = found.build(D, found.options(**options))
        mixer.reset_parameters(InitialValues(0.02, 12, 24, torch.Generator().manual_seed(0)))
        bound = torch.full((D,), 0.5, device="cuda") if mixer.uses_lower_bound else None
        context = Context(keep_state=False, lower_bound=bound)
        return mixer, lambda layer, x: layer(x, None, context)[0]

    return make


def fla(name: str, **options: Any) -> Callable[[], Layer]:
    """A layer of flash-linear-attention."""

    def make() -> Layer:
        from fla import layers  # pyright: ignore[reportMissingImports]

        layer = getattr(layers, name)(hidden_size=D, layer_idx=1, **options)
        bound = torch.full((D,), 0.5, device="cuda")

        def call(layer: nn.Module, x: Tensor) -> Tensor:
            found = layer(x, lower_bound=bound) if "HGRN" in name else layer(x)
            return found[0] if isinstance(found, tuple) else found

        return layer, call

    return make


def fla_mamba() -> Layer:
    """flash-linear-attention's Mamba, with its own convolution, as mamba_ssm is not installed."""
    from fla.layers.mamba import Mamba  # pyright: ignore[reportMissingImports]

    layer = Mamba(hidden_size=D, intermediate_size=2 * D, layer_idx=0, backend="triton")
    return layer, lambda layer, x: layer(x)


def transformers_mamba(**options: Any) -> Callable[[], Layer]:
    """The Mamba of transformers without the kernels of mamba_ssm."""

    def make() -> Layer:
        from transformers import MambaConfig  # pyright: ignore[reportMissingImports]
        from transformers.models.mamba.modeling_mamba import MambaMixer  # pyright: ignore[reportMissingImports]

        config = MambaConfig(hidden_size=D, state_size=16, num_hidden_layers=1, expand=2, **options)

        def call(layer: nn.Module, x: Tensor) -> Tensor:
            found = layer(x)
            return found[0] if isinstance(found, tuple) else found

        return MambaMixer(config, 0), call

    return make


def transformers_griffin() -> Layer:
    """The recurrent block of RecurrentGemma in transformers, whose recurrence is a loop in Python."""
    from transformers import RecurrentGemmaConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as model  # pyright: ignore

    config = RecurrentGemmaConfig(hidden_size=D, lru_width=D, num_attention_heads=16, num_hidden_layers=3)
    block = model.RecurrentGemmaRecurrentBlock(config, 0)
    positions = torch.arange(LENGTH, device="cuda")[None].expand(BATCH, -1)
    nn.init.uniform_(block.rg_lru.recurrent_param, -2, 0)
    for weight in (block.rg_lru.input_gate_weight, block.rg_lru.recurrent_gate_weight):
        nn.init.normal_(weight, 0, 0.02)
    for bias in (block.rg_lru.input_gate_bias, block.rg_lru.recurrent_gate_bias):
        nn.init.zeros_(bias)
    return block, lambda layer, x: layer(x, positions, None, use_cache=False)[0]


def transformers_llama() -> Layer:
    """The attention of transformers' Llama with torch's kernel."""
    from transformers import LlamaConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding  # pyright: ignore

    config = LlamaConfig(hidden_size=D, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    positions = LlamaRotaryEmbedding(config).cuda()(
        torch.zeros(1, device="cuda", dtype=DTYPE), torch.arange(LENGTH, device="cuda")[None]
    )
    return LlamaAttention(config, 0), lambda layer, x: layer(x, position_embeddings=positions, attention_mask=None)[0]


CASES: dict[str, tuple[Callable[[], Layer], dict[str, Callable[[], Layer]], str]] = {
    "hgrn2": (ours("hgrn2", expand_ratio=128), {"fla's HGRN2": fla("HGRN2Attention", expand_ratio=128)}, ""),
    "hgrn1 (real)": (ours("hgrn1", form="real"), {"fla's HGRN": fla("HGRNAttention")}, ""),
    "hgrn1 (complex)": (ours("hgrn1"), {}, "none runs: the authors' extension no longer builds, fla has the real form"),
    "gla, 16 heads": (
        ours("gla", num_heads=16), {"fla's GLA": fla("GatedLinearAttention", num_heads=16)}, "K = 64, V = 128",
    ),
    "gla, 4 heads": (
        ours("gla", num_heads=4), {"fla's GLA": fla("GatedLinearAttention", num_heads=4)}, "K = 256, V = 512",
    ),
    "rwkv5": (ours("rwkv5"), {}, "none runs: fla and transformers have no RWKV-5"),
    "rwkv6": (
        ours("rwkv6"), {"fla's RWKV6": fla("RWKV6Attention", num_heads=32, expand_k=1.0, expand_v=1.0)}, "",
    ),
    "rebased": (ours("rebased"), {"fla's ReBased": fla("ReBasedLinearAttention")}, ""),
    "mamba": (
        ours("mamba"),
        {
            "transformers, mambapy": transformers_mamba(use_mambapy=True),
            "transformers, associative scan": transformers_mamba(use_associative_scan=True),
            "fla's Mamba": fla_mamba,
            "transformers": transformers_mamba(),
        },
        "mamba_ssm, with kernels, is no wheel and is not installed",
    ),
    "griffin": (ours("griffin"), {"RecurrentGemma (transformers)": transformers_griffin}, ""),
    "attention": (ours("attention", num_heads=16), {"Llama (transformers, sdpa)": transformers_llama}, ""),
}  # fmt: skip


class Candidate:
    """A layer that runs forward and backward.

    Args:
        make: makes the layer.
        compiled: with torch.compile.
    """

    def __init__(self, make: Callable[[], Layer], compiled: bool):
        torch.manual_seed(0)
        layer, call = make()
        self.layer = layer.to("cuda", DTYPE)
        self.call = torch.compile(call) if compiled else call
        self.x = torch.randn(BATCH, LENGTH, D, device="cuda", dtype=DTYPE, requires_grad=True)
        self.dy = torch.randn(BATCH, LENGTH, D, device="cuda", dtype=DTYPE)
        self.wanted = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def run(self) -> list[Tensor]:
        """The output and the gradients."""
        y = self.call(self.layer, self.x)
        grads = torch.autograd.grad(y, self.wanted, self.dy, allow_unused=True)
        return [y.detach(), *(g for g in grads if g is not None)]

    def check(self) -> float:
        """Check that results are finite; return the seconds of a second run."""
        self.run()
        torch.cuda.synchronize()
        start = time.monotonic()
        found = self.run()
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        names = ["output", *(f"gradient {i}" for i in range(len(found) - 1))]
        wrong = [name for name, x in zip(names, found, strict=True) if not bool(x.isfinite().all())]
        if wrong:
            raise ArithmeticError(f"not finite: {', '.join(wrong)}")
        return seconds

    def milliseconds(self, calls: int) -> float:
        """Time of one run, of several in a row."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            self.run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / calls


def child(name: str, folder: Path, only_ours: bool) -> None:
    """Warm up the candidates of a mixer, wait for the turn, time them and write the rows."""
    own, peers, _ = CASES[name]
    place, rows = folder / name.replace(" ", "_"), []
    ready: dict[str, tuple[Candidate, float]] = {}
    # transformers' Mamba takes what it can get, and the others run beside it
    torch.cuda.set_per_process_memory_fraction(0.55)
    makers = {"ours": own} | ({} if only_ours else peers)
    for peer, make in makers.items():
        for compiled in (False, True):
            # a compiler unrolls a loop over tokens, which takes hours; layers of fla are fused by hand, and fla says
            # nothing of torch.compile
            if compiled and (peer.startswith("fla's") or peer in ("transformers", "RecurrentGemma (transformers)")):
                continue
            shown = f"{peer}, {'compiled' if compiled else 'eager'}"
            try:
                candidate = Candidate(make, compiled)
                ready[shown] = candidate, candidate.check()
            except Exception as error:
                rows.append(
                    {"name": shown, "ms": None, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                )
                traceback.print_exc()
                torch.cuda.empty_cache()
    place.with_suffix(".ready").touch()
    while not place.with_suffix(".go").exists():
        time.sleep(0.02)
    times: dict[str, list[float]] = {shown: [] for shown in ready}
    for i in range(ROUNDS):
        for shown, (candidate, seconds) in ready.items():
            if i and seconds * ROUNDS > BUDGET_S:
                continue
            times[shown].append(candidate.milliseconds(max(1, min(CALLS, int(0.3 / max(seconds, 1e-4))))))
    for shown, found in times.items():
        rows.append({"name": shown, "ms": statistics.median(found), "low": min(found), "high": max(found)})
    place.with_suffix(".part").write_text(json.dumps(rows))
    place.with_suffix(".part").rename(place.with_suffix(".json"))


def start(name: str, folder: Path, only_ours: bool) -> int:
    """Start the process of a mixer; it shares the modules imported so far."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with (folder / f"{name.replace(' ', '_')}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            child(name, folder, only_ours)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError


def has_ended(pid: int) -> bool:
    """Return whether a process has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def wait(pid: int, path: Path, deadline: float) -> bool:
    """Wait until a process has written a file; False if it ended or time is over."""
    while not path.exists():
        if has_ended(pid) or time.monotonic() > deadline:
            return path.exists()
        time.sleep(0.02)
    return True


def rows_of(name: str, found: list[dict[str, Any]], note: str) -> list[Row]:
    """Rows of one mixer: all that was timed, and our best against the best peer."""
    rows = [Row(f"{name}: {x['name']}", x["ms"], "ms", x.get("low"), x.get("high"), note=x.get("note")) for x in found]
    timed = [row for row in rows if row.value]
    mine = [row for row in timed if f"{name}: ours" in row.name]
    others = [row for row in timed if row not in mine]
    if mine:
        best = min(mine, key=lambda row: row.value or 0)
        best.note = note or None
        if others:
            peer = min(others, key=lambda row: row.value or 0)
            best.peer, best.ratio = peer.name, (peer.value or 0) / (best.value or 1)
    return rows


def main() -> int:
    """Runs the benchmark."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--mixers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--only-ours", action="store_true", help="no peers")
    parser.add_argument("--limit-s", type=float, default=170, help="until everything is compiled")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/rival-layers"), help="logs of the processes")
    parser.set_defaults(device="cuda")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.iterdir():
        old.unlink()
    began = time.monotonic()
    # many processes compile at once
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    pids = {name: start(name, options.folder, options.only_ours) for name in options.mixers}
    rows: list[Row] = []
    settings = {"B": BATCH, "T": LENGTH, "D": D, "dtype": "bfloat16", "pass": "forward + backward"}
    ready = {}
    for name, pid in pids.items():
        ready[name] = wait(pid, options.folder / f"{name.replace(' ', '_')}.ready", began + options.limit_s)
    print(f"warm after {time.monotonic() - began:.0f} s", file=sys.stderr)
    for name, pid in pids.items():
        # those that still compile would disturb the clock
        if not ready[name]:
            kill(pid)
    for name, pid in pids.items():
        place = options.folder / name.replace(" ", "_")
        found: list[dict[str, Any]] = []
        if ready[name]:
            place.with_suffix(".go").touch()
            if wait(pid, place.with_suffix(".json"), time.monotonic() + 90):
                found = json.loads(place.with_suffix(".json").read_text())
        kill(pid)
        if not found:
            log = " ".join(place.with_suffix(".log").read_text(errors="replace").split())
            found = [{"name": "ours", "ms": None, "note": f"no result: {log[-300:]}"}]
        rows += rows_of(name, found, CASES[name][2])
        for row in rows[-len(found) :]:
            print(row, file=sys.stderr, flush=True)
        if options.out:
            options.out.with_suffix(".partial.json").write_text(json.dumps([vars(row) for row in rows]))
    report("rival_layers", settings, rows, options.device, options.out)
    return 0


def kill(pid: int) -> None:
    """End a process."""
    if not has_ended(pid):
        os.kill(pid, 9)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
