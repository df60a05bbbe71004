"""The operator on a GPU beside other kernels, attention, and what the chip can do at all.

Everything is compared with the float64 recurrence first, at the size that is timed: gradients are asked for from the
first tokens of one sequence, and those of its first heads are compared. Rows show the relative RMS error of each output
and gradient, beside the rival's on the same inputs. Times are those of CUDA events, a call after the other, on sets of
inputs in turn. Reached by `scan.py --device cuda`.

Kernels that take long to compile are compiled first, in processes side by side. What was measured is kept in a file
beside the result, which ends in .unfinished, until the result is there: a run that is cut off is not lost.

Besides the sizes that are compared with peers there are cases of the operator alone: less friendly gates (errors only),
packed sequences, float32, gates that forget everything with and without a floor under the decay, the operator with a
key of its own, and gates that hardly decay in one long sequence.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import environment  # noqa: F401  (before torch)
import torch
from exact import (
    LIMITS,
    FreeInputs,
    Inputs,
    error,
    errors,
    exact,
    free_inputs,
    free_loop,
    free_scan,
    loop,
    make_inputs,
    scan,
    with_backward,
    without_gradients,
)
from report import Row, compare, make_record, report, row, write_record
from rivals import fla_hgrn2
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgrn2.ops import hgrn2_step

SHAPES = ((16, 2048), (32, 1024), (4, 8192), (1, 32_768), (1, 131_072))
HEADS, WIDTH = 16, 128
DECODING_BATCHES = (1, 64, 256)
STEPS = 10
SETS = 2
CHECKED_TOKENS, CHECKED_HEADS = 2048, 2
# more than fla's largest in bfloat16, 3.8e-3, is wrong
LIMIT, RIVAL_LIMIT = 4e-3, 3e-2
# errors that differ by less are the same
NO_WORSE = 1.05
ERROR_UNIT = "relative RMS"
# gates that hardly decay
SLOW_BOUND = 0.999
# with which the authors train
FLOOR = -3.0
# draws sequences of which one ends among the tokens that are checked
PACKING_SEED = 1
# no candidate is timed for longer than this a row
SECONDS = 3.0
OURS, FLA, CUDNN, FLASH = "hgrn2", "fla chunk_gla with gates", "attention, cuDNN", "attention, FlashAttention-2"
FORWARD, BOTH = "forward", "forward + backward"

Calls = Sequence[Callable[[], object]]
Operands = Inputs | FreeInputs
Functions = Mapping[str, Callable[..., Tensor]]
# relative RMS error of each output and gradient, or why there is none
Errors = dict[str, float] | str


class Shape(NamedTuple):
    """B, T, H and K = V."""

    batch: int
    length: int
    heads: int = HEADS
    width: int = WIDTH

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.length

    def make(self, device: str, dtype: torch.dtype = torch.bfloat16, bound: float = 0.5) -> Inputs:
        """Fresh inputs of this shape."""
        return make_inputs(*self, self.width, device, dtype, bound)


class Case(NamedTuple):
    """Checks, and optional timings, on inputs of one kind.

    Attributes:
        name: the first words of its rows.
        make: fresh inputs.
        functions: candidates by name.
        truth: what they are compared with, in float64.
        tokens: how many of them are compared.
        limit: of the operator's errors.
    """

    name: str
    make: Callable[[], Operands]
    functions: Functions
    truth: Callable[..., Tensor] = loop
    tokens: int = CHECKED_TOKENS
    limit: float = LIMIT


def required_cases(shapes: Sequence[Shape], functions: Functions, device: str) -> list[Case]:
    """Those in which an error of the operator ends the benchmark: the sizes, and less friendly gates at the end."""
    short = Shape(1, *shapes[0][1:])

    def less_friendly() -> Inputs:
        """Many gates near 0 and 1."""
        inputs = short.make(device)
        bound = torch.rand_like(inputs.lower_bound).mul_(0.9)
        return inputs._replace(f=4 * inputs.f, lower_bound=bound)

    cases = [Case(str(shape), partial(shape.make, device), functions) for shape in shapes]
    return [*cases, Case(f"{short}, bounds in [0, 0.9), gates' pre-activations x 4", less_friendly, functions)]


def packed_starts(tokens: int, sequences: int) -> Tensor:
    """cu_seqlens [N + 1], int32, of sequences of uneven lengths, the same ones in every run."""
    random = torch.Generator().manual_seed(PACKING_SEED)
    cuts = 1 + torch.randperm(tokens - 1, generator=random)[: sequences - 1].sort().values
    return torch.tensor([0, *cuts.tolist(), tokens], dtype=torch.int32)


def further_cases(shapes: Sequence[Shape], device: str) -> list[Case]:
    """Other ways to call the operator, each of which fails alone."""
    shape, long = shapes[0], shapes[-1]
    ours = {OURS: scan}
    packed = Shape(1, shape.tokens, *shape[2:])
    starts = packed_starts(shape.tokens, shape.batch)
    checked = min(CHECKED_TOKENS, shape.tokens)

    def closed() -> Inputs:
        """Gates that forget everything several times a chunk, which go a longer way through it."""
        inputs = shape.make(device, bound=0.0)
        return inputs._replace(f=4 * inputs.f)

    first = torch.cat([starts[starts < checked], torch.tensor([checked], dtype=starts.dtype)])
    return [
        Case(
            f"{packed}, {shape.batch} sequences packed",
            partial(packed.make, device),
            {OURS: partial(scan, cu_seqlens=starts.to(device))},
            partial(loop, cu_seqlens=first.to(device)),
            checked,
        ),
        Case(f"{shape}, float32", partial(shape.make, device, torch.float32), ours, limit=LIMITS[torch.float32]),
        Case(f"{shape}, no bound, gates' pre-activations x 4", closed, ours),
        Case(
            f"{shape}, no bound, gates' pre-activations x 4, log decays of at least {FLOOR:g}",
            closed,
            {OURS: partial(scan, min_log_decay=FLOOR)},
            partial(loop, min_log_decay=FLOOR),
        ),
        Case(f"{shape}, gated_scan", lambda: free_inputs(shape.make(device)), {OURS: free_scan}, free_loop),
        # cuts into segments lie beyond the first tokens, so all are compared, with the chunked form in float64: a loop
        # over them would have to keep every state
        Case(
            f"{long}, bound {SLOW_BOUND}",
            partial(long.make, device, bound=SLOW_BOUND),
            ours,
            partial(scan, backend="chunked"),
            long.length,
        ),
    ]


def moved_bytes(inputs: Operands) -> dict[str, int]:
    """Bytes that must move: inputs and y; and for the backward pass inputs, dy and gradients once more."""
    read, written = sum(x.nbytes for x in inputs), inputs.v.nbytes
    return {FORWARD: read + written, BOTH: 3 * read + 2 * written}


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

    def __init__(
        self,
        inputs: Operands,
        dy: Tensor,
        tokens: int = CHECKED_TOKENS,
        truth: Callable[..., Tensor] = loop,
    ):
        self.rows = (slice(0, 1), slice(0, tokens), slice(0, CHECKED_HEADS))
        # with no gradient asked of what comes later, that of the first tokens depends on them alone
        self.dy = torch.zeros_like(dy)
        self.dy[self.rows] = dy[self.rows]
        part = self._part(inputs)
        with torch.no_grad():
            self.wanted = exact(part, None, truth)
        self.wanted += exact(part, dy[self.rows], truth)

    def _part(self, inputs: Operands) -> Operands:
        return inputs._make(x[self.rows] if x.dim() == 4 else x[:CHECKED_HEADS] for x in inputs)

    def errors(self, function: Callable[..., Tensor], inputs: Operands) -> dict[str, float]:
        """Relative RMS errors of y, dq, ... of a candidate that is given the whole batch."""
        y = without_gradients(function, inputs)()[self.rows]
        gradients = self._part(inputs._make(with_backward(function, inputs, self.dy)()))
        names = ("y", *(f"d{name}" for name in inputs._fields))
        return dict(zip(names, errors((y, *gradients), self.wanted), strict=True))


def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of torch, made to use one kernel; inputs [B, H, T, K]."""
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_with_backward(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Attend, and compute the gradients."""
    return torch.autograd.grad(attend(backend, q, k, v), (q, k, v), dy)


def attention_calls(backend: SDPBackend, sets: Sequence[tuple[Operands, Tensor]]) -> dict[str, Calls]:
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


SOURCES = (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent / "src")
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
        # the compiler of the CUDA kernels keeps a cache of its own
        caches = {"TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "cache", "CUDA_CACHE_PATH": "nv"}
        caches = {name: f"{folder}/{place}" for name, place in caches.items()}
        paths = os.pathsep.join(filter(None, (str(SOURCES[-1]), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=os.environ | caches | {"PYTHONPATH": paths},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if done.returncode:
        return Row(name, None, "s", note=f"failed: {done.stderr.strip().splitlines()[-1][:160]}")
    return Row(name, float(done.stdout), "s")


COMPILE_AHEAD = (
    # of this package what is not compiled in seconds, and the rival
    """
import torch, hgrn2
q, f, v = (torch.randn(1, 2048, 16, 128, device="cuda", requires_grad=True) for _ in range(3))
bound = torch.full((16, 128), 0.5, device="cuda", requires_grad=True)
y, _ = hgrn2.ops.hgrn2_scan(q, f, v, bound)
torch.autograd.grad(y.sum(), (q, f, v, bound))
""",
    """
import torch, hgrn2
q, k, v = (torch.randn(1, 2048, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
log_f = (-torch.rand(1, 2048, 16, 128, device="cuda")).requires_grad_()
y, _ = hgrn2.ops.gated_scan(q, k, v, log_f)
torch.autograd.grad(y.sum(), (q, k, v, log_f))
""",
    """
import torch
from rivals import fla_hgrn2
q, f, v = (torch.randn(1, 2048, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
bound = torch.full((16, 128), 0.5, device="cuda", requires_grad=True)
y = fla_hgrn2()(q, f, v, bound)
torch.autograd.grad(y.sum(), (q, f, v, bound))
""",
)


def compile_ahead(rival: bool) -> None:
    """Fills Triton's cache, side by side; what fails here fails again, and is told, where it is measured."""
    paths = os.pathsep.join(filter(None, (*map(str, SOURCES), os.environ.get("PYTHONPATH"))))
    codes = COMPILE_AHEAD if rival else COMPILE_AHEAD[:-1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL
        )
        for code in codes
    ]
    for process in running:
        process.wait()


class Progress:
    """Says on stderr what is done, and keeps what was measured so far, should the run be cut off."""

    def __init__(self, settings: Mapping[str, object], device: str, out: Path | None):
        self.settings, self.device = settings, device
        self.kept = None if out is None else out.with_name(out.name + ".unfinished")
        self.start = time.perf_counter()

    def __call__(self, done: str, rows: Sequence[Row] = ()) -> None:
        """Tells and keeps."""
        print(f"{time.perf_counter() - self.start:4.0f} s  {done}", file=sys.stderr)
        if self.kept is not None and rows:
            write_record(make_record("scan", self.settings, rows, self.device), self.kept)

    def finish(self) -> None:
        """The result is there."""
        if self.kept is not None:
            self.kept.unlink(missing_ok=True)


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


def check(case: Case, required: bool) -> dict[str, Errors]:
    """Errors of every candidate; what the operator raises is passed on if it is required to run."""
    inputs = case.make()
    checked = Checked(inputs, torch.randn_like(inputs.v), case.tokens, case.truth)
    found: dict[str, Errors] = {}
    for name, function in case.functions.items():
        try:
            found[name] = checked.errors(function, inputs)
        # that a rival does not run is a result too
        except Exception as failure:
            if required and name == OURS:
                raise
            found[name] = reason_of(failure)
    return found


def fault(case: Case, name: str, found: Errors) -> str | None:
    """Why a candidate must not be timed."""
    if isinstance(found, str):
        return found
    limit = case.limit if name == OURS else RIVAL_LIMIT
    large = ", ".join(f"{key} {value:.1e}" for key, value in found.items() if not value <= limit)
    return f"wrong: relative error of {large}, allowed {limit:.0e}" if large else None


def error_rows(case: Case, found: Mapping[str, Errors]) -> list[Row]:
    """A row for each error, the operator's beside the rival's."""
    rows = []
    for name, values in found.items():
        if isinstance(values, str):
            rows.append(Row(f"{case.name}: {name}, error", None, ERROR_UNIT, note=values))
            continue
        for key, value in values.items():
            # JSON knows no other numbers
            finite = math.isfinite(value)
            label = f"{case.name}: {name}, error of {key}"
            rows.append(Row(label, value if finite else None, ERROR_UNIT, note=None if finite else "not finite"))
    for r in rows:
        compare(rows, r.name, r.name.replace(f": {OURS}, ", f": {FLA}, "))
        if r.ratio is not None and r.ratio < 1 / NO_WORSE:
            r.note = f"worse than {FLA} by {1 / r.ratio - 1:.0%}"
    return rows


def timed_rows(
    case: Case, found: Mapping[str, Errors], sets: Sequence[tuple[Operands, Tensor]], bandwidth: float, rounds: int
) -> list[Row]:
    """Times and memory of every candidate that is right, on inputs and gradients dy of one size."""
    moved = moved_bytes(sets[0][0])
    rows = []
    for name, function in case.functions.items():
        reason = fault(case, name, found[name])
        if reason is not None:
            rows.append(Row(f"{case.name}: {name}", None, "ms", note=reason))
            continue
        calls: dict[str, Calls] = {
            FORWARD: [without_gradients(function, inputs) for inputs, _ in sets],
            BOTH: [with_backward(function, inputs, dy) for inputs, dy in sets],
        }
        for kind, each in calls.items():
            seconds = event_times(each, rounds)
            timed = row(f"{case.name}: {name}, {kind}", [1e3 * s for s in seconds], "ms")
            assert timed.value is not None
            timed.note = f"{moved[kind] / bandwidth / (1e-3 * timed.value):.0%} of the copy bandwidth"
            rows.append(timed)
        # gradients themselves are part of it
        note = f"v is {sets[0][0].v.nbytes / 2**20:.0f} MiB"
        memory = f"{case.name}: {name}, {BOTH}, extra memory"
        rows.append(Row(memory, peak_bytes(calls[BOTH][0]) / 2**20, "MiB", note=note))
    return rows


def make_sets(case: Case) -> list[tuple[Operands, Tensor]]:
    """Inputs, and gradients of y, to be used in turn."""
    every = [case.make() for _ in range(SETS)]
    return [(inputs, torch.randn_like(inputs.v)) for inputs in every]


def measure(case: Case, found: Mapping[str, Errors], bandwidth: float, rounds: int) -> list[Row]:
    """All times of one size: the candidates, attention and the floor."""
    sets = make_sets(case)
    rows = timed_rows(case, found, sets, bandwidth, rounds)
    for name, backend in ((CUDNN, SDPBackend.CUDNN_ATTENTION), (FLASH, SDPBackend.FLASH_ATTENTION)):
        try:
            for kind, calls in attention_calls(backend, sets).items():
                seconds = event_times(calls, rounds)
                rows.append(row(f"{case.name}: {name}, {kind}", [1e3 * s for s in seconds], "ms"))
        except RuntimeError as failure:
            rows.append(Row(f"{case.name}: {name}", None, "ms", note=reason_of(failure)))
    for kind, moved in moved_bytes(sets[0][0]).items():
        note = "bytes that must move, at the copy bandwidth"
        rows.append(Row(f"{case.name}: floor, {kind}", 1e3 * moved / bandwidth, "ms", note=note))
        compare(rows, f"{case.name}: {OURS}, {kind}", f"{case.name}: {CUDNN}, {kind}")
        compare(rows, f"{case.name}: {OURS}, {kind}", f"{case.name}: {FLA}, {kind}")
    compare(rows, f"{case.name}: {OURS}, {BOTH}, extra memory", f"{case.name}: {FLA}, {BOTH}, extra memory")
    return rows


def measure_alone(case: Case, bandwidth: float, rounds: int) -> tuple[list[Row], bool]:
    """Errors and times of a case that may fail alone, and whether nothing failed."""
    try:
        found = check(case, required=False)
        rows = error_rows(case, found) + timed_rows(case, found, make_sets(case), bandwidth, rounds)
    # what was measured before it shall not be lost
    except Exception as failure:
        return [Row(case.name, None, "ms", note=reason_of(failure))], False
    return rows, all(fault(case, name, values) is None for name, values in found.items())


def per_token(rows: Sequence[Row], far: Shape, near: Shape, names: Iterable[str]) -> list[Row]:
    """How much more time a token takes at one shape than at another; 1 when time is linear in tokens."""
    by_name = {r.name: r.value for r in rows}
    found = []
    for name in names:
        for kind in (FORWARD, BOTH):
            late, early = (by_name.get(f"{shape}: {name}, {kind}") for shape in (far, near))
            if late and early:
                ratio = late / far.tokens / (early / near.tokens)
                note = "time a token; 1 is linear"
                found.append(Row(f"{far} per token against {near}: {name}, {kind}", ratio, "x", note=note))
    return found


def benchmark(device: str, rounds: int, out: Path | None) -> int:
    """Runs everything; 1 when the operator is wrong, and then no time of it.

    A wrong result at one of the sizes, of less friendly gates or of a step ends the run; one of a further case is shown
    in its row.
    """
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    shapes = [Shape(*shape) for shape in SHAPES]
    settings = {"H": HEADS, "K": WIDTH, "V": WIDTH, "dtype": "bfloat16", "rounds": rounds}
    progress = Progress(settings, device, out)
    functions, rows = operators()
    compile_ahead(FLA in functions)
    progress("kernels compiled")
    cases = required_cases(shapes, functions, device)
    found = {}
    for case in cases:
        found[case.name] = check(case, required=True)
        progress(f"{case.name}: checked")
    accuracy = {case.name: error_rows(case, found[case.name]) for case in cases}
    faults = [(case.name, fault(case, OURS, found[case.name][OURS])) for case in cases]
    wrong = [f"{name}: {reason}" for name, reason in faults if reason is not None]
    worst_step = step_error(device)
    if not worst_step <= LIMIT:
        wrong.append(f"hgrn2_step: relative error {worst_step:.1e}, allowed {LIMIT:.0e}")
    if wrong:
        print(*wrong, "error: the operator is wrong; nothing was timed", sep="\n", file=sys.stderr)
        return 1

    copies = row("copy bandwidth", [1e-12 * rate for rate in copy_bandwidth(device, rounds)], "TB/s")
    products = row("bfloat16 product, 8192 cubed", [1e-12 * rate for rate in matmul_rate(device, rounds)], "TFLOP/s")
    assert copies.value is not None
    bandwidth = 1e12 * copies.value
    rows += [copies, products]
    timed = {str(shape) for shape in shapes}
    for case in cases:
        rows += accuracy[case.name]
        if case.name in timed:
            rows += measure(case, found[case.name], bandwidth, rounds)
        progress(f"{case.name}: measured", rows)
        _tidy()
    rows += per_token(rows, shapes[-1], shapes[0], functions)
    for batch in DECODING_BATCHES:
        microseconds = [1e6 * s for s in step_times(batch, device, rounds)]
        # each state is read once and written once
        moved = 2 * 4 * batch * HEADS * WIDTH**2
        step = row(f"hgrn2_step, batch {batch}, in a CUDA graph", microseconds, "us")
        assert step.value is not None
        share = moved / (1e-6 * step.value) / bandwidth
        step.note = f"error {worst_step:.1e}, {share:.0%} of the copy bandwidth"
        rows.append(step)
    rows.append(first_call())
    progress("steps and the first call: measured", rows)
    right = True
    for case in further_cases(shapes, device):
        alone, passed = measure_alone(case, bandwidth, rounds)
        rows += alone
        right &= passed
        progress(f"{case.name}: measured", rows)
        _tidy()
    report("scan", settings, rows, device, out)
    progress.finish()
    return 0 if right else 1


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()
