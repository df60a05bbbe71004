"""The operator against other ways to run it: forward, forward with backward, and time against length.

Every candidate is compared with the float64 recurrence before anything is timed; a candidate of this package that is
wrong ends the benchmark without a single time, a rival that is wrong is shown without one.

    python benchmarks/scan.py --device cpu --out benchmarks/results/scan-cpu.json

On a GPU the candidates, the peers and the sizes are others: `scan_cuda.py`.

    python benchmarks/scan.py --device cuda --out benchmarks/results/scan-cuda.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import environment  # noqa: F401  (before torch)
import torch
from exact import LIMITS, error, exact, loop, make_inputs, scan, with_backward, without_gradients
from report import Row, arguments, compare, interleave, report, row
from rivals import log_space_scan, onnx_linear_attention
from torch import Tensor

EAGER, COMPILED = "chunked float32, eager", "chunked float32, compiled"
BF16, BF16_COMPILED = "chunked bfloat16, eager", "chunked bfloat16, compiled"
NAIVE = "loop over tokens, float32"
LOG_SPACE = "log-space chunks, float32, compiled"
ORT, ORT_STANDARD = "ONNX Runtime LinearAttention, float32", "ONNX Runtime LinearAttention of opset 27, float32"
ORT_ALONE = "the same without gate math"
BACKWARD = ", with backward"
RIVAL_LIMIT = 1e-4


class Bench:
    """Candidates that passed, and rows of those that could not take part."""

    def __init__(self) -> None:
        self.candidates: dict[str, Callable[[], object]] = {}
        self.notes: dict[str, str] = {}
        self.left_out: list[Row] = []

    def add(
        self, name: str, call: Callable[[], Tensor | tuple[Tensor, ...]], wanted: list[Tensor], limit: float
    ) -> bool:
        """Admits a candidate whose error is within the limit; False when it is not."""
        found = call()
        worst = error([found] if isinstance(found, Tensor) else found, wanted)
        if not worst <= limit:
            self.left_out.append(Row(name, None, "ms", note=f"wrong: relative error {worst:.1e}, allowed {limit:.0e}"))
            return False
        self.candidates[name] = call
        self.notes[name] = f"error {worst:.0e}"
        return True

    def add_rival(
        self, name: str, make: Callable[[], Callable[[], Tensor | tuple[Tensor, ...]]], wanted: list[Tensor]
    ) -> None:
        """Admits a rival if it can be built here and is right."""
        try:
            self.add(name, make(), wanted, RIVAL_LIMIT)
        # a rival that fails is a result too
        except Exception as reason:
            text = " ".join(str(reason).split())
            self.left_out.append(
                Row(name, None, "ms", note=f"does not run here: {type(reason).__name__}: {text[:160]}")
            )

    def rows(self, rounds: int, device: str) -> list[Row]:
        """Times what was admitted."""
        seconds = interleave(self.candidates, rounds, device)
        timed = [row(name, [1e3 * s for s in times], "ms", self.notes[name]) for name, times in seconds.items()]
        return timed + self.left_out


def sweep(
    lengths: list[int], batch: int, heads: int, k_width: int, v_width: int, rounds: int, device: str
) -> list[Row]:
    """Microseconds a token at growing lengths: constant when time is linear in T."""
    rows = []
    for length in lengths:
        inputs = make_inputs(batch, length, heads, k_width, v_width, device)
        (seconds,) = interleave({"": lambda x=inputs: scan(*x)}, rounds, device).values()
        rows.append(row(f"chunked float32 at T {length}", [1e6 * s / (batch * length) for s in seconds], "us/token"))
    first = rows[0].value
    for r in rows[1:]:
        assert first is not None
        assert r.value is not None
        r.peer, r.ratio = rows[0].name, first / r.value
    return rows


def main() -> int:
    """Runs the benchmark; 1 when a candidate of this package is wrong."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.epilog = "Sizes and sweep are for the CPU; with --device cuda the sizes are fixed."
    for name, size in (("batch", 1), ("length", 2048), ("heads", 8), ("k-width", 128), ("v-width", 128)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--sweep", type=int, nargs="*", default=[2**i for i in range(10, 17)], help="lengths of the sweep"
    )
    parser.add_argument("--sweep-rounds", type=int, default=3)
    parser.add_argument("--forward-only", action="store_true")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda":
        import scan_cuda

        return scan_cuda.benchmark(options.device, options.rounds, options.out)
    if options.length % 64:
        parser.error(f"--length is {options.length}; the log-space rival wants a multiple of 64")
    device, shape = options.device, (options.batch, options.length, options.heads, options.k_width, options.v_width)
    torch.set_num_threads(options.threads)
    inputs = make_inputs(*shape, device)
    low = inputs.to(torch.bfloat16)
    dy = torch.randn_like(inputs.v)
    compiled, rival = torch.compile(scan, fullgraph=True), torch.compile(log_space_scan, fullgraph=True)
    ours = [
        (EAGER, scan, inputs, torch.float32),
        (COMPILED, compiled, inputs, torch.float32),
        (BF16, scan, low, torch.bfloat16),
        (BF16_COMPILED, compiled, low, torch.bfloat16),
    ]

    forward, backward = Bench(), Bench()
    right = True
    with torch.no_grad():
        wanted = {torch.float32: exact(inputs, None), torch.bfloat16: exact(low, None)}
        for name, function, x, dtype in ours:
            right &= forward.add(name, without_gradients(function, x), wanted[dtype], LIMITS[dtype])
        forward.add_rival(NAIVE, lambda: without_gradients(loop, inputs), wanted[torch.float32])
        forward.add_rival(LOG_SPACE, lambda: without_gradients(rival, inputs), wanted[torch.float32])
        if device == "cpu":
            for name, domain, gates in (
                (ORT, "com.microsoft", True),
                (ORT_ALONE, "com.microsoft", False),
                (ORT_STANDARD, "", True),
            ):
                forward.add_rival(
                    name,
                    lambda domain=domain, gates=gates: onnx_linear_attention(*inputs, domain, gates, options.threads),
                    wanted[torch.float32],
                )
    if not options.forward_only:
        wanted = {torch.float32: exact(inputs, dy), torch.bfloat16: exact(low, dy.bfloat16().float())}
        for name, function, x, dtype in ours:
            right &= backward.add(name + BACKWARD, with_backward(function, x, dy), wanted[dtype], LIMITS[dtype])
        backward.add_rival(LOG_SPACE + BACKWARD, lambda: with_backward(rival, inputs, dy), wanted[torch.float32])
    if not right:
        for r in forward.left_out + backward.left_out:
            print(f"{r.name}: {r.note}", file=sys.stderr)
        print("error: a candidate of this package is wrong; nothing was timed", file=sys.stderr)
        return 1

    rows = forward.rows(options.rounds, device)
    if not options.forward_only:
        rows += backward.rows(options.rounds, device)
    for name in (EAGER, COMPILED, BF16, BF16_COMPILED):
        rivals = [r for r in rows if r.name in (LOG_SPACE, ORT) and r.value is not None]
        best = min(rivals, key=lambda r: r.value or 0.0, default=None)
        if best is not None:
            compare(rows, name, best.name)
        compare(rows, name + BACKWARD, LOG_SPACE + BACKWARD)
    with torch.no_grad():
        if options.sweep:
            sizes = (options.batch, options.heads, options.k_width, options.v_width)
            rows += sweep(options.sweep, *sizes, options.sweep_rounds, device)
    settings = dict(zip(("B", "T", "H", "K", "V"), shape, strict=True)) | {"rounds": options.rounds}
    report("scan", settings, rows, device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
