"""The operator on a GPU beside other kernels, attention, and what the chip can do at all.

Everything is compared with the float64 recurrence first, at the size that is timed: gradients are asked for from the
first tokens of one sequence, and those of its first heads are compared. Times are those of CUDA events, a call after
the other, on sets of inputs in turn. Reached by `scan.py --device cuda`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from exact import LIMITS, Inputs, error, exact, make_inputs, scan, with_backward, without_gradients
from report import Row, compare, report, row
from rivals import fla_hgrn2
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgrn2.ops import hgrn2_step

SHAPES = ((16, 2048), (4, 8192), (1, 32_768), (1, 131_072))
HEADS, WIDTH = 16, 128
DECODING_BATCHES = (1, 64, 256)
STEPS = 10
SETS = 2
# bytes that must move a channel and token: q, f, v and y; and q, f, v, dy, dq, df and dv once more
FORWARD_BYTES, BACKWARD_BYTES = 8, 14
CHECKED_TOKENS, CHECKED_HEADS = 2048, 2
RIVAL_LIMIT = 3e-2
# no candidate is timed for longer than this a row
SECONDS = 3.0
OURS, FLA, CUDNN, FLASH = "hgrn2", "fla chunk_gla with gates", "attention, cuDNN", "attention, FlashAttention-2"
FORWARD, BOTH = "forward", "forward + backward"

Calls = Sequence[Callable[[], object]]


class Shape(NamedTuple):
    """B, T, H and K = V."""

    batch: int
    length: int
    heads: int = HEADS
    width: int = WIDTH

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length}"

    @property
    def channels(self) -> int:
        """Values of v: tokens times channels."""
        return self.batch * self.length * self.heads * self.width


def event_times(calls: Calls, rounds: int) -> list[float]:
    """Seconds of each call by CUDA events: every set of inputs `rounds` times, in turn, after a warm-up of each."""
    for _ in range(2):
        for call in calls:
            call()
    first = _timed(calls[:1])
    rounds = max(3, min(rounds, int(SECONDS / max(sum(first) * len(calls), 1e-9))))
    return _timed([call for _ in range(rounds) for call in calls])


def _timed(calls: Calls) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * before.elapsed_time(after) for before, after in pairwise(marks)]


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory a call takes on top of what is there before it."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Checked:
    """The first tokens and heads of a batch's first sequence, and their exact outputs and gradients."""

    def __init__(self, inputs: Inputs, dy: Tensor):
        self.rows = (slice(0, 1), slice(0, CHECKED_TOKENS), slice(0, CHECKED_HEADS))
        # with no gradient asked of what comes later, that of the first tokens depends on them alone
        self.dy = torch.zeros_like(dy)
        self.dy[self.rows] = dy[self.rows]
        part = self._part(inputs)
        with torch.no_grad():
            self.wanted = exact(part, None)
        self.wanted += exact(part, dy[self.rows])

    def _part(self, inputs: Inputs) -> Inputs:
        q, f, v = (x[self.rows] for x in inputs[:3])
        return Inputs(q, f, v, inputs.lower_bound[:CHECKED_HEADS])

    def error(self, function: Callable[..., Tensor], inputs: Inputs) -> float:
        """The largest relative error of a candidate that is given the whole batch."""
        y = without_gradients(function, inputs)()[self.rows]
        gradients = self._part(Inputs(*with_backward(function, inputs, self.dy)()))
        return error((y, *gradients), self.wanted)


def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of torch, made to use one kernel; inputs [B, H, T, K]."""
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_with_backward(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The same, and the gradients."""
    return torch.autograd.grad(attend(backend, q, k, v), (q, k, v), dy)


def attention_calls(backend: SDPBackend, sets: Sequence[tuple[Inputs, Tensor]]) -> dict[str, Calls]:
    """Calls forward, and forward with backward, on the same numbers with heads before tokens."""
    forward, both = [], []
    for inputs, dy in sets:
        q, k, v, dy = (x.transpose(1, 2).contiguous() for x in (*inputs[:3], dy))
        forward.append(partial(attend, backend, q, k, v))
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        both.append(partial(attend_with_backward, backend, q, k, v, dy))
    return {FORWARD: forward, BOTH: both}


def copy_bandwidth(device: str, rounds: int) -> list[float]:
    """Bytes a second of copies, read and written, of more than any cache holds."""
    size = 1 << 30
    source, target = torch.empty(2, size, dtype=torch.int8, device=device).unbind(0)
    return [2 * size / s for s in event_times([lambda: target.copy_(source)], rounds)]


def matmul_rate(device: str, rounds: int) -> list[float]:
    """Operations a second of a large bfloat16 product."""
    size = 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind(0)
    return [2 * size**3 / s for s in event_times([lambda: a @ b], rounds)]


def step_times(batch: int, device: str, rounds: int) -> list[float]:
    """Seconds of one step: ten states in a captured graph, each its own as in ten layers, each changed in place."""
    shape = (batch, HEADS, WIDTH)
    bound = torch.full(shape[1:], 0.5, device=device)
    layers = [
        (
            *torch.randn(3, *shape, device=device, dtype=torch.bfloat16).unbind(0),
            torch.zeros(*shape, WIDTH, device=device),
        )
        for _ in range(STEPS)
    ]

    @torch.no_grad()
    def decode() -> list[Tensor]:
        return [hgrn2_step(q, f, v, state, bound, inplace=True)[0] for q, f, v, state in layers]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = decode()
    times = [s / STEPS for s in event_times([graph.replay], 5 * rounds)]
    del kept
    return times


def step_error(device: str) -> float:
    """Largest relative error of a step."""
    q, f, v = torch.randn(3, 4, HEADS, WIDTH, device=device, dtype=torch.bfloat16).unbind(0)
    state = torch.randn(4, HEADS, WIDTH, WIDTH, device=device)
    bound = torch.full((HEADS, WIDTH), 0.5, device=device)
    wide = (q.double(), f.double(), v.double(), state.double(), bound.double())
    wanted = hgrn2_step(*wide, backend="reference")
    with torch.no_grad():
        return error(hgrn2_step(q, f, v, state, bound, inplace=True), wanted)


FIRST_CALL = """
import time, torch, hgrn2
q, f, v = (torch.randn(1, 2048, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
bound = torch.full((16, 128), 0.5, device="cuda", requires_grad=True)
torch.cuda.synchronize()
start = time.perf_counter()
y, _ = hgrn2.ops.hgrn2_scan(q, f, v, bound)
torch.autograd.grad(y, (q, f, v, bound), torch.ones_like(y))
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call() -> Row:
    """Seconds of the first forward + backward of a fresh process that finds no compiled kernel."""
    name = f"first {BOTH} of a process, nothing cached"
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(__file__).resolve().parent.parent / "src")
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
        paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=os.environ | caches | {"PYTHONPATH": paths},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if done.returncode:
        return Row(name, None, "s", note=f"failed: {done.stderr.strip().splitlines()[-1][:160]}")
    return Row(name, float(done.stdout), "s")


def operators() -> tuple[dict[str, Callable[..., Tensor]], list[Row]]:
    """The operator, and the rival that computes the same, or why it does not."""
    found: dict[str, Callable[..., Tensor]] = {OURS: scan}
    try:
        found[FLA] = fla_hgrn2()
    except ImportError as reason:
        return found, [Row(FLA, None, "ms", note=f"does not run here: {reason}")]
    return found, []


def reason_of(failure: Exception) -> str:
    """In a line."""
    return f"does not run here: {type(failure).__name__}: {' '.join(str(failure).split())[:120]}"


def check(
    shapes: Sequence[Shape], functions: Mapping[str, Callable[..., Tensor]], device: str
) -> dict[tuple[Shape, str], float | str]:
    """The error of every candidate at every size, or why it has none."""
    found: dict[tuple[Shape, str], float | str] = {}
    for shape in shapes:
        inputs = make_inputs(*shape, shape.width, device, torch.bfloat16)
        checked = Checked(inputs, torch.randn_like(inputs.v))
        for name, function in functions.items():
            try:
                found[shape, name] = checked.error(function, inputs)
            # that a rival does not run is a result too; for the operator it is an error
            except Exception as failure:
                if name == OURS:
                    raise
                found[shape, name] = reason_of(failure)
    return found


def measure(
    shape: Shape,
    functions: Mapping[str, Callable[..., Tensor]],
    errors: Mapping[tuple[Shape, str], float | str],
    bandwidth: float,
    rounds: int,
    device: str,
) -> list[Row]:
    """All rows of one size."""
    sets = []
    for _ in range(SETS):
        inputs = make_inputs(*shape, shape.width, device, torch.bfloat16)
        sets.append((inputs, torch.randn_like(inputs.v)))
    floors = {FORWARD: FORWARD_BYTES * shape.channels / bandwidth}
    floors[BOTH] = floors[FORWARD] + BACKWARD_BYTES * shape.channels / bandwidth
    rows = []

    def add(name: str, kind: str, calls: Calls, note: str) -> None:
        seconds = event_times(calls, rounds)
        timed = row(f"{shape}: {name}, {kind}", [1e3 * s for s in seconds], "ms", note)
        assert timed.value is not None
        timed.note = f"{note}{', ' if note else ''}{1e3 * floors[kind] / timed.value:.0%} of the copy bandwidth"
        rows.append(timed)

    for name, function in functions.items():
        worst = errors[shape, name]
        if isinstance(worst, str) or not worst <= RIVAL_LIMIT:
            note = worst if isinstance(worst, str) else f"wrong: relative error {worst:.1e}, allowed {RIVAL_LIMIT:.0e}"
            rows.append(Row(f"{shape}: {name}", None, "ms", note=note))
            continue
        add(name, FORWARD, [without_gradients(function, inputs) for inputs, _ in sets], f"error {worst:.1e}")
        both = [with_backward(function, inputs, dy) for inputs, dy in sets]
        add(name, BOTH, both, f"error {worst:.1e}")
        memory = f"{shape}: {name}, {BOTH}, extra memory"
        # gradients themselves are part of it
        rows.append(Row(memory, peak_bytes(both[0]) / 2**20, "MiB", note=f"v is {2 * shape.channels / 2**20:.0f} MiB"))
    for name, backend in ((CUDNN, SDPBackend.CUDNN_ATTENTION), (FLASH, SDPBackend.FLASH_ATTENTION)):
        try:
            for kind, calls in attention_calls(backend, sets).items():
                seconds = event_times(calls, rounds)
                rows.append(row(f"{shape}: {name}, {kind}", [1e3 * s for s in seconds], "ms"))
        except RuntimeError as failure:
            rows.append(Row(f"{shape}: {name}", None, "ms", note=reason_of(failure)))
    for kind, floor in floors.items():
        rows.append(
            Row(f"{shape}: floor, {kind}", 1e3 * floor, "ms", note="bytes that must move, at the copy bandwidth")
        )
        compare(rows, f"{shape}: {OURS}, {kind}", f"{shape}: {CUDNN}, {kind}")
        compare(rows, f"{shape}: {OURS}, {kind}", f"{shape}: {FLA}, {kind}")
    compare(rows, f"{shape}: {OURS}, {BOTH}, extra memory", f"{shape}: {FLA}, {BOTH}, extra memory")
    return rows


def benchmark(device: str, rounds: int, out: Path | None) -> int:
    """Runs everything; 1, and no time, when the operator is wrong."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    shapes = [Shape(*shape) for shape in SHAPES]
    functions, rows = operators()
    errors = check(shapes, functions, device)
    limit = LIMITS[torch.bfloat16]
    wrong = [
        f"{shape}: relative error {worst:.1e}, allowed {limit:.0e}"
        for (shape, name), worst in errors.items()
        if name == OURS and not (isinstance(worst, float) and worst <= limit)
    ]
    worst_step = step_error(device)
    if not worst_step <= limit:
        wrong.append(f"hgrn2_step: relative error {worst_step:.1e}, allowed {limit:.0e}")
    if wrong:
        print(*wrong, "error: the operator is wrong; nothing was timed", sep="\n", file=sys.stderr)
        return 1

    copies = row("copy bandwidth", [1e-12 * rate for rate in copy_bandwidth(device, rounds)], "TB/s")
    products = row("bfloat16 product, 8192 cubed", [1e-12 * rate for rate in matmul_rate(device, rounds)], "TFLOP/s")
    assert copies.value is not None
    rows += [copies, products]
    for shape in shapes:
        rows += measure(shape, functions, errors, 1e12 * copies.value, rounds, device)
        gc.collect()
        torch.cuda.empty_cache()
    for batch in DECODING_BATCHES:
        microseconds = [1e6 * s for s in step_times(batch, device, rounds)]
        # each state is read once and written once
        moved = 2 * 4 * batch * HEADS * WIDTH**2
        timed = row(f"hgrn2_step, batch {batch}, in a CUDA graph", microseconds, "us")
        assert timed.value is not None
        share = moved / (1e-6 * timed.value) / (1e12 * copies.value)
        timed.note = f"error {worst_step:.1e}, {share:.0%} of the copy bandwidth"
        rows.append(timed)
    rows.append(first_call())
    settings = {"H": HEADS, "K": WIDTH, "V": WIDTH, "dtype": "bfloat16", "rounds": rounds}
    report("scan", settings, rows, device, out)
    return 0
