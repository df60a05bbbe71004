"""Measure the time of each kernel of the operator's forward and backward pass on a GPU, and the memory they take.

The sum of the times of the kernels is what a call costs where others are queued behind it, as in training. A call that
is waited for costs what the host does before the first kernel as well; both are shown.

    python benchmarks/kernel_times.py --out benchmarks/results/kernels.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import environment  # noqa: F401  (before torch)
import torch
from exact import Inputs, make_inputs, scan, with_backward, without_gradients
from report import Row, arguments, report, row
from scan_cuda import HEADS, SHAPES, WIDTH, peak_bytes
from torch.profiler import ProfilerActivity, profile

from hgrn2.ops.norm import rms_norm

# of 32,768 tokens, so that all sizes can be compared
TOKENS = 32_768
CALLS = 5


def waited_for(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of calls, each waited for."""
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return times


def by_kernel(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel in one call, the longest first."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    found = {event.key: 1e-3 * event.device_time_total / CALLS for event in profiler.key_averages()}
    return dict(sorted(((key, ms) for key, ms in found.items() if ms > 0), key=lambda item: -item[1]))


def rows_of(batch: int, length: int, inputs: Inputs, rounds: int) -> list[Row]:
    """All rows of one size, per 32,768 tokens."""
    dy, share = torch.randn_like(inputs.v), TOKENS / (batch * length)
    calls: dict[str, Callable[[], object]] = {
        "forward": without_gradients(scan, inputs),
        "forward + backward": with_backward(scan, inputs, dy),
    }
    found, name = [], f"B{batch} T{length}"
    for kind, call in calls.items():
        call()
        found.append(row(f"{name}: {kind}, waited for", [1e3 * share * s for s in waited_for(call, rounds)], "ms"))
        kernels = by_kernel(call)
        found.append(Row(f"{name}: {kind}, sum of kernels", share * sum(kernels.values()), "ms"))
        if kind == "forward + backward":
            found += [Row(f"{name}: {key.split('(')[0][:60]}", share * ms, "ms") for key, ms in kernels.items()]
    memory = share * peak_bytes(calls["forward + backward"]) / 2**20
    found.append(Row(f"{name}: forward + backward, extra memory", memory, "MiB"))
    return found


def backward_of(forward: Callable[[], torch.Tensor], x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> None:
    """A forward pass and its gradients."""
    torch.autograd.grad(forward(), (x, weight), dy)


def norm_rows(device: str) -> list[Row]:
    """RMSNorm over all heads, as after the scan, in one kernel and as torch does it: sums of kernels."""
    width, found = HEADS * WIDTH, []
    kinds = {
        "bfloat16": (torch.bfloat16, torch.bfloat16),
        "bfloat16, weight float32": (torch.bfloat16, torch.float32),
        "float32 to bfloat16": (torch.float32, torch.float32),
    }
    for kind, (dtype, weight_dtype) in kinds.items():
        x = torch.randn(TOKENS, width, device=device, dtype=dtype, requires_grad=True)
        weight = torch.rand(width, device=device, dtype=weight_dtype, requires_grad=True)
        dy = torch.randn(TOKENS, width, device=device, dtype=torch.bfloat16)
        for backend in ("triton", "torch"):
            forward = partial(rms_norm, x, weight, 1e-5, torch.bfloat16, backend)
            calls = {
                "forward": torch.no_grad()(forward),
                "forward + backward": partial(backward_of, forward, x, weight, dy),
            }
            # x and y; then x, dy and dx
            moved = [x.nbytes + dy.nbytes, 3 * x.nbytes + 2 * dy.nbytes]
            for (name, call), num_bytes in zip(calls.items(), moved, strict=True):
                ms = sum(by_kernel(call).values())
                note = f"{num_bytes / ms / 1e9:.2f} TB/s of what must move"
                found.append(Row(f"norm, {kind}, {backend}: {name}", ms, "ms", note=note))
    return found


def main() -> int:
    """Measures every size."""
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cuda")
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda" or not torch.cuda.is_available():
        parser.error("kernels are measured on a GPU, and there is none here")
    make = partial(make_inputs, k_width=WIDTH, v_width=WIDTH, device=options.device, dtype=torch.bfloat16)
    rows = []
    for batch, length in SHAPES:
        rows += rows_of(batch, length, make(batch, length, HEADS), options.rounds)
    rows += norm_rows(options.device)
    settings = {"H": HEADS, "K": WIDTH, "V": WIDTH, "dtype": "bfloat16", "per tokens": TOKENS}
    report("kernels", settings, rows, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
