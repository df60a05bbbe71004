"""Finds the block sizes of the Triton kernels on this GPU and writes them into their table.

Each kernel is timed alone on the real buffers, at 32,768 tokens of 16 heads, for every candidate; the chunk size is the
one with the smallest sum. A choice is written only if outputs and gradients agree with float64 (the recurrence, two
heads). Compiling takes far longer than measuring: processes side by side do it first.

    python benchmarks/tune.py --k-width 64 --v-width 64 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

import environment  # noqa: F401  (before torch)
import torch
from kernel_times import waited_for

from hgrn2.ops import hgrn2_scan
from hgrn2.ops.backends.triton import blocks, launch
from hgrn2.ops.backends.triton.blocks import Block, Blocks
from hgrn2.ops.call import ScanCall, ScanSettings

BATCH, LENGTH, HEADS = 16, 2048, 16
CHUNKS = (32, 64)
# launches of each kernel in a forward and a backward pass
LAUNCHES = {"update": 3, "output": 2, "gradient": 1}
ERRORS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make_scan(dtype: torch.dtype, k_width: int, v_width: int, device: str, batch: int = BATCH) -> ScanCall:
    """A call with fresh random inputs."""
    q, f = (torch.randn(batch, LENGTH, HEADS, k_width, device=device).to(dtype) for _ in range(2))
    v = torch.randn(batch, LENGTH, HEADS, v_width, device=device).to(dtype)
    bound = torch.full((HEADS, k_width), 0.5, device=device)
    return ScanCall(q, f, None, v, bound, None, None, ScanSettings(q_activation="silu"))


def milliseconds(call: Callable[[], None], rounds: int = 10) -> float:
    """Median time of a call on the GPU."""
    call()
    return 1e3 * statistics.median(waited_for(call, rounds))


def candidates(k_width: int, v_width: int) -> list[Block]:
    """Blocks worth a try."""
    found = set()
    for k, v, warps in itertools.product((32, 64, 128), (32, 64, 128), (4, 8)):
        found.add(blocks.fit(Block(k, v, warps, 1), k_width, v_width))
    return sorted(found, key=dataclasses.astuple)


def kernels(scan: ScanCall, sizes: Blocks) -> dict[str, Callable[[], None]]:
    """A call of each kernel by the name of its blocks, on buffers that are filled already."""
    launch.blocks_for = lambda *_: sizes
    run, group, device = launch.Launcher(scan), (0, HEADS), scan.q.device
    states, d_states = run.new_states(HEADS), run.new_states(HEADS)
    decays = torch.empty((run.chunks.total, HEADS, 2, scan.q.shape[-1]), device=device)
    dy, y, dq, df = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (scan.v, scan.v, scan.q, scan.f)
    )
    d_bound = torch.empty((run.chunks.total, HEADS, scan.q.shape[-1]), device=device)
    dy.normal_(), states.normal_(), d_states.normal_(), decays.uniform_()
    return {
        "update": lambda: run.updates(scan.v, states, decays, group, of_queries=False),
        "output": lambda: run.outputs(scan.v, states, y, group, of_queries=False),
        "gradient": lambda: run.gradients(dy, states, d_states, decays, (dq, df, None, d_bound), group),
    }


@cache
def _scan_of_process(dtype: torch.dtype, k_width: int, v_width: int) -> ScanCall:
    # many processes share the memory
    return make_scan(dtype, k_width, v_width, "cuda", batch=1)


def compile_one(job: tuple[int, str, Block], dtype: torch.dtype, k_width: int, v_width: int) -> None:
    """Leaves a kernel in Triton's cache, if it fits the chip."""
    chunk, name, block = job
    try:
        kernels(_scan_of_process(dtype, k_width, v_width), Blocks(chunk, block, block, block))[name]()
        torch.cuda.synchronize()
    # told where it is measured
    except Exception:
        return


def compile_ahead(dtype: torch.dtype, k_width: int, v_width: int, processes: int) -> None:
    """Leaves every candidate in Triton's cache."""
    jobs = list(itertools.product(CHUNKS, LAUNCHES, candidates(k_width, v_width)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(partial(compile_one, dtype=dtype, k_width=k_width, v_width=v_width), jobs))


def tune(scan: ScanCall, chunk: int) -> tuple[float, Blocks]:
    """The best sizes for a chunk and the time of one forward and backward pass with them."""
    k_width, v_width = scan.q.shape[-1], scan.v.shape[-1]
    total = 0.0
    best: dict[str, Block] = {}
    for name, count in LAUNCHES.items():
        times: dict[Block, float] = {}
        for block in candidates(k_width, v_width):
            try:
                times[block] = milliseconds(kernels(scan, Blocks(chunk, block, block, block))[name])
            # what does not fit the chip is no candidate
            except Exception as reason:
                print(f"chunk {chunk} {name} {block}: {type(reason).__name__}", file=sys.stderr)
        best[name] = min(times, key=lambda block: times[block])
        total += count * times[best[name]]
        print(f"chunk {chunk} {name}: {times[best[name]]:.3f} ms with {best[name]}")
    return total, Blocks(chunk, best["update"], best["output"], best["gradient"])


def worst_error(scan: ScanCall, sizes: Blocks) -> float:
    """Largest relative RMS error of outputs and gradients of two heads of one sequence."""
    launch.blocks_for = lambda *_: sizes
    part = [x[:1, :512, :2].detach() for x in (scan.q, scan.f, scan.v)]
    assert scan.lower_bound is not None
    bound = scan.lower_bound[:2]

    def results(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in part]
        y, _ = hgrn2_scan(inputs[0], inputs[1], inputs[2], bound, backend=backend)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    found, exact = results(scan.q.dtype, "triton"), results(torch.float64, "reference")
    errors = []
    for x, wanted in zip(found, exact, strict=True):
        difference = x.detach().double() - wanted.detach()
        errors.append(float(difference.square().mean().sqrt() / wanted.detach().square().mean().sqrt()))
    return max(errors)


def main() -> int:
    """Tunes one dtype and pair of widths; 1 when the best sizes are wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--k-width", type=int, default=128)
    parser.add_argument("--v-width", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="that compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    dtype = getattr(torch, options.dtype)
    compile_ahead(dtype, options.k_width, options.v_width, options.processes)
    scan = make_scan(dtype, options.k_width, options.v_width, "cuda")
    _, sizes = min((tune(scan, chunk) for chunk in CHUNKS), key=lambda found: found[0])
    error = worst_error(scan, sizes)
    if not error <= ERRORS[dtype]:
        print(f"error: {sizes} are wrong by {error:.1e}, allowed {ERRORS[dtype]:.0e}; not written", file=sys.stderr)
        return 1
    table = json.loads(blocks.TABLE.read_text(encoding="utf-8"))
    chip = table.setdefault(torch.cuda.get_device_name(), {})
    chip[blocks.key(dtype, options.k_width, options.v_width)] = dataclasses.asdict(sizes)
    blocks.TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"{blocks.TABLE.name}: {sizes}, error {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
