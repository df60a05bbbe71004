"""The operators on a GPU: kernels compiled, against the float64 recurrence, in hostile shapes, gates and memory.

Kernels are compiled for many shapes, which takes far longer than to run them: `tests/shards.py` spreads the tests over
processes, which share Triton's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hgrn2 import HGRN2LM, presets
from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step, resolve_backend
from hgrn2.ops.backends.cuda.arguments import PackedArguments
from hgrn2.ops.backends.cuda.kernels import Settings
from hgrn2.ops.backends.cuda.kernels import compiled as cuda_kernel
from hgrn2.ops.backends.cuda.launch import run_launches
from hgrn2.ops.backends.cuda.launch_list import NULL, BufferRef, LaunchList
from hgrn2.ops.backends.cuda.plan import CHUNK, num_chunks
from hgrn2.ops.gates import Floor
from tests.numerics import EXTREME_RMS, assert_close, assert_equal, assert_no_worse, relative_error, run
from tests.ops.scan_cases import BY_TOKEN, decays, free_inputs, honest, slow, spread, tied_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch calls its search for hidden waits a prototype
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
# for processes of their own
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}
# cuBLAS wants it where torch is to be deterministic, which fills fresh memory with NaN
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
OPERATORS = tuple(INPUTS)
both_operators = pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.__name__)
# float32 products of three TF32 ones, summed in another order than on a CPU
ORDINARY_RMS = 5e-6
# other strides may be other code, which adds up in another order
SAME_RMS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
LOW = (torch.bfloat16, torch.float16)
# empty ones first, in a row and last; single tokens, whole chunks, more than a chunk
CU_SEQLENS = (0, 0, 1, 65, 65, 65, 129, 135, 1000, 1000)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    op: Callable[..., tuple[torch.Tensor, ...]]
    dtype: torch.dtype
    length: int = 130
    k_width: int = 64
    v_width: int = 64
    batch: int = 1
    heads: int = 2
    reverse: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    state: bool = True
    bound: float | None = 0.9
    activations: tuple[str, str] | None = None
    backend: str = "auto"
    min_log_decay: float | None = None

    def __str__(self) -> str:
        parts = [self.op.__name__, str(self.dtype).removeprefix("torch."), f"T{self.length}"]
        parts += [f"K{self.k_width}", f"V{self.v_width}"]
        flags = {"reverse": self.reverse, "packed": self.cu_seqlens, "nostate": not self.state}
        parts += [name for name, flag in flags.items() if flag] + list(self.activations or ())
        parts += [self.backend] if self.backend != "auto" else []
        parts += [f"floor{self.min_log_decay}"] if self.min_log_decay is not None else []
        return "-".join(parts)

    def inputs(self) -> dict[str, Any]:
        """Random ones, on the GPU."""
        bound = {"bound": self.bound} if self.op is hgrn2_scan else {}
        cu_seqlens = None if self.cu_seqlens is None else list(self.cu_seqlens)
        shape = (self.batch, self.length, self.heads, self.k_width, self.v_width)
        made = INPUTS[self.op](*shape, dtype=self.dtype, cu_seqlens=cu_seqlens, state=self.state, **bound)
        return on_gpu(made)

    def settings(self) -> dict[str, Any]:
        """Settings that are not tensors."""
        names = dict(zip(("q_activation", "v_activation"), self.activations or (), strict=False))
        floor = {} if self.min_log_decay is None else {"min_log_decay": self.min_log_decay}
        return {"reverse": self.reverse, **names, **floor}


def cases() -> list[Case]:
    """The grid. Each number of each kind stands beside several of the others, not beside all."""
    found = []
    for i, length in enumerate((0, 1, 15, 16, 17, 63, 64, 65, 130, 1000, 4096)):
        for j, op in enumerate(OPERATORS):
            batch = 2 if length < 1000 else 1
            found.append(Case(op, torch.float32, length, 32, 48, batch, reverse=(i + j) % 2 == 1))
    widths = [
        (16, 256), (256, 16), (32, 64), (64, 32), (64, 128), (128, 64), (128, 256), (256, 128), (256, 256), (128, 128),
        (20, 96), (96, 20),
    ]  # fmt: skip
    for i, (k_width, v_width) in enumerate(widths):
        for j, dtype in enumerate((torch.float32, *LOW)):
            op = OPERATORS[(i + j) % 2]
            found.append(Case(op, dtype, 200, k_width, v_width, heads=4, reverse=i % 4 < 2))
    for op in OPERATORS:
        found += [Case(op, torch.float32, 70, 1, 1), Case(op, torch.float32, 70, 6, 5, batch=3, heads=1)]
        found += [Case(op, dtype, length, heads=4, batch=2) for dtype in LOW for length in (17, 64, 1000)]
        for dtype in (torch.float32, torch.bfloat16):
            for reverse in (False, True):
                found.append(Case(op, dtype, 1000, 32, 64, heads=4, reverse=reverse, cu_seqlens=CU_SEQLENS))
        found.append(Case(op, torch.float32, 1000, 32, 64, heads=4, cu_seqlens=CU_SEQLENS, state=False))
        found.append(Case(op, torch.float32, 130, state=False, batch=2))
    for activations in (("sigmoid", "silu"), ("none", "none")):
        for bound in (None, 0.9):
            found.append(Case(hgrn2_scan, torch.float32, bound=bound, activations=activations))
    found.append(Case(hgrn2_scan, torch.bfloat16, 200, heads=4, bound=None))
    # the size that has kernels of its own on some GPUs, and the general ones at it
    for dtype in LOW:
        for i, length in enumerate((1, 15, 16, 17, 63, 64, 65, 130, 1000, 4096)):
            batch = 2 if length < 1000 else 1
            found.append(Case(hgrn2_scan, dtype, length, 128, 128, batch, reverse=i % 2 == 1))
        found += [Case(hgrn2_scan, dtype, 130, 128, 128, bound=None, reverse=reverse) for reverse in (False, True)]
        for backend in ("auto", "triton"):
            found.append(Case(hgrn2_scan, dtype, 1000, 128, 128, reverse=True, backend=backend))
        for reverse in (False, True):
            found.append(Case(hgrn2_scan, dtype, 1000, 128, 128, reverse=reverse, cu_seqlens=CU_SEQLENS))
        found.append(Case(hgrn2_scan, dtype, 1000, 128, 128, cu_seqlens=CU_SEQLENS, bound=None))
        # one that holds few of the gates, and one that holds most
        for floor in (-3.0, -0.1):
            found.append(Case(hgrn2_scan, dtype, 1000, 128, 128, bound=None, min_log_decay=floor))
        found.append(Case(hgrn2_scan, dtype, 130, 128, 128, batch=2, activations=("sigmoid", "silu")))
        found.append(
            Case(hgrn2_scan, dtype, 1000, 128, 128, bound=None, activations=("none", "silu"), min_log_decay=-50.0)
        )
        found.append(Case(hgrn2_scan, dtype, 1000, 128, 128, reverse=True, cu_seqlens=CU_SEQLENS, min_log_decay=-0.5))
    activations = ("sigmoid", "silu")
    found.append(Case(hgrn2_scan, torch.float32, bound=None, activations=activations, min_log_decay=-0.5))
    found.append(Case(hgrn2_scan, torch.bfloat16, 200, heads=4, min_log_decay=-0.5))
    return found


CASES = cases()


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if torch.is_tensor(x) else x for name, x in inputs.items()}


def exact(op, inputs, backend="reference", **settings):
    return run(op, inputs, dtype=torch.float64, backend=backend, **settings)


def exact_in_chunks(op, inputs, **settings):
    """Exact results for long sequences: in float64 the chunked form equals the recurrence (`test_agreement.py`)."""
    return exact(op, inputs, "chunked", **settings)


@pytest.fixture
def plain_memory(hostile_memory):
    """Inductor has no kernel to fill what it allocates."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)


def test_the_kernels_are_what_runs():
    for dtype in (torch.float32, *LOW):
        assert resolve_backend("auto", torch.device("cuda"), dtype, 256, 256) == "triton"
    assert torch.empty(1000, device="cuda").isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case):
    inputs, settings = case.inputs(), case.settings()
    wanted = exact(case.op, inputs, **settings)
    found = run(case.op, inputs, backend=case.backend, **settings)
    assert {x.dtype for x in found.values()} <= {case.dtype, torch.float32}
    if case.dtype == torch.float32:
        assert_close(found, wanted, ORDINARY_RMS)
    else:
        assert_no_worse(found, honest(case.op, inputs, **settings), wanted)


def test_a_large_case_is_as_exact_as_the_best_rival():
    generator = torch.Generator("cuda").manual_seed(0)
    q, f, v, dy = torch.randn(4, 1, 2048, 2, 128, device="cuda", generator=generator).bfloat16().unbind(0)
    bound = torch.full((2, 128), 0.5, device="cuda")
    results = []
    for dtype, backend in ((torch.bfloat16, "auto"), (torch.float64, "reference")):
        leaves = tuple(x.to(dtype).requires_grad_() for x in (q, f, v))
        y, _ = hgrn2_scan(*leaves, bound, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))))
    # measured with the same kind of inputs for a chunked kernel that works with cumulative logarithms
    limits = {"y": 2.5e-3, "dq": 3.1e-3, "df": 3.8e-3, "dv": 1.8e-3}
    errors = {name: relative_error(*pair).rms for name, *pair in zip(limits, *results, strict=True)}
    assert all(errors[name] <= limit for name, limit in limits.items()), f"{errors}, wanted {limits}"


def check_extreme(op, inputs, **settings):
    """Against the oracle; below 1e-27 nothing is promised, as a decay below 1e-30 counts as that."""
    inputs = on_gpu(inputs)
    wanted, found = exact(op, inputs, **settings), run(op, inputs, **settings)
    for name in [name for name, x in wanted.items() if x.abs().max() < 1e-27]:
        assert found.pop(name).abs().max() < 1e-27, name
        del wanted[name]
    assert_close(found, wanted, EXTREME_RMS)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bound", [0.0, 0.9999])
@pytest.mark.parametrize("z", ["wild", -1e4, -88.0, -20.0, -5.0, 0.0, 9.0, 14.0, 20.0, 80.0, 1e4])
def test_extreme_tied_gates(z, bound, reverse):
    inputs = tied_inputs(1, 200, 2, 16, 16)
    inputs["lower_bound"] = torch.full((2, 16), bound)
    inputs["f"] = spread(inputs["f"].shape, (-1e4, -30.0, 0.0, 8.0, 1e4)) if z == "wild" else inputs["f"] * 0 + z
    check_extreme(hgrn2_scan, inputs, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["log-uniform", "per channel", "wild", "seldom reset", 0.0, -1e-6, -1e-4, -1e-2, -1.0, -20.0, -50.0, -float("inf")],
)
def test_extreme_decays(kind, reverse):
    inputs = free_inputs(1, 200, 2, 16, 16)
    inputs["log_f"] = decays(kind, inputs["log_f"].shape)
    check_extreme(gated_scan, inputs, reverse=reverse)


@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("gates", ["slow", "fast", "wild"])
@pytest.mark.parametrize("width", [64, 128])
def test_low_precision_is_honest_at_extreme_gates(width, dtype, gates):
    shape = (2, 200, 4, width, width)
    tied, free = tied_inputs(*shape, dtype=dtype), free_inputs(*shape, dtype=dtype)
    factors = {"slow": 0.01, "fast": 10.0, "wild": spread(shape[:-1], (1e-4, 1.0, 30.0))}
    shifts = {"slow": 5.0, "fast": -5.0, "wild": spread(shape[:-1], (-30.0, 0.0, 8.0))}
    tied["f"] = (tied["f"] + shifts[gates]).to(dtype)
    free["log_f"] = free["log_f"] * factors[gates]
    for op, inputs in ((hgrn2_scan, on_gpu(tied)), (gated_scan, on_gpu(free))):
        assert_no_worse(run(op, inputs), honest(op, inputs, False), exact(op, inputs))


@pytest.mark.parametrize("z", [-20.0, -7.1, -6.8, -3.6, -3.4, -2.3, -1.7, -1.4, 3.0, 9.0])
def test_gates_around_where_the_way_through_a_chunk_changes(z):
    inputs = tied_inputs(1, 300, 2, 128, 128, dtype=torch.bfloat16, bound=None)
    inputs = on_gpu(inputs | {"f": torch.full_like(inputs["f"], z)})
    assert_no_worse(run(hgrn2_scan, inputs), honest(hgrn2_scan, inputs, False), exact(hgrn2_scan, inputs))
    # values so small, or large, that a product with such decays leaves the range of numbers
    for size in (1e-12, 1e8):
        scaled = inputs | {"v": inputs["v"] * size, "initial_state": inputs["initial_state"] * size}
        found, wanted = (op(hgrn2_scan, scaled, gradients=False) for op in (run, exact))
        assert_close(found, wanted, 4e-3)


@pytest.mark.parametrize("z", [-40.0, -17.0, -12.0, -9.0])
def test_the_bound_s_gradient_beside_few_closed_gates(z):
    inputs = on_gpu(tied_inputs(1, 300, 2, 128, 128, dtype=torch.bfloat16, bound=0.0))
    inputs["f"][0, ::90, :, ::5] = z
    found, wanted = run(hgrn2_scan, inputs), exact(hgrn2_scan, inputs)
    # of these channels alone: others' gradients are larger
    channels = [x["d_lower_bound"][:, ::5] for x in (found, wanted)]
    assert relative_error(*channels).rms <= 1e-2


@pytest.mark.parametrize("z", [9.0, 14.0, 20.0])
def test_closed_gates_among_wide_open_ones(z):
    # no bound: whether gradients by gates are right enough is found on the way
    inputs = tied_inputs(1, 300, 2, 128, 128, dtype=torch.bfloat16, bound=None)
    f = torch.full_like(inputs["f"], z)
    f[:, ::29], f[:, 5::64, 0] = -z, 0.0
    inputs = on_gpu(inputs | {"f": f + 0.1 * inputs["f"]})
    found, wanted = run(hgrn2_scan, inputs), exact(hgrn2_scan, inputs)
    assert_close(found, wanted, 5e-3)
    for head in range(2):
        assert relative_error(*(x["d_f"][:, :, head] for x in (found, wanted))).rms <= 5e-3


# segments, and parts of the backward pass
@pytest.mark.parametrize(
    ("batch", "length", "heads", "shift", "bound"),
    [(1, 20_000, 2, 0.0, 0.9), (1, 20_000, 2, 6.0, None), (2, 9000, 3, 3.0, 0.99), (1, 5000, 16, 0.0, None)],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_cut_into_pieces_is_as_exact_as_a_short_one(batch, length, heads, shift, bound, reverse):
    inputs = tied_inputs(batch, length, heads, 128, 128, dtype=torch.bfloat16, bound=bound)
    inputs = on_gpu(inputs | {"f": inputs["f"] + shift})
    found, wanted = (op(hgrn2_scan, inputs, reverse=reverse) for op in (run, exact_in_chunks))
    assert_close(found, wanted, 5e-3)


def test_packed_sequences_over_many_segments():
    bounds = [0, 10, 2000, 2000, 4500, 5000, 5064]
    inputs = on_gpu(tied_inputs(1, 5064, 2, 128, 128, dtype=torch.bfloat16, cu_seqlens=bounds))
    for reverse in (False, True):
        found, wanted = (op(hgrn2_scan, inputs, reverse=reverse) for op in (run, exact_in_chunks))
        assert_close(found, wanted, 5e-3)


@pytest.mark.parametrize("bounds", [[0, 1000], [-100, 200], [0, 300, 100], [0, 50, 200]])
def test_boundaries_that_do_not_fit_touch_no_other_memory(bounds):
    inputs = on_gpu(tied_inputs(1, 200, 2, 128, 128, dtype=torch.bfloat16, cu_seqlens=bounds))
    found = run(hgrn2_scan, inputs)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in found.values())


@both_operators
def test_bad_values_do_not_reach_the_next_packed_sequence(op):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = on_gpu(INPUTS[op](1, 400, 1, 128, 128, dtype=dtype, cu_seqlens=[0, 70, 400]))
        inputs["v"][0, 0, 0, 3] = float("nan")
        y, state = op(**inputs)
        assert y[:, :70, 0, 3].isnan().all()
        assert y[:, 70:].isfinite().all()
        assert state[1].isfinite().all()


def test_contiguous_inputs_at_an_odd_address():
    q, f, v = torch.randn(3 * 64 * 128 + 1, device="cuda").bfloat16()[1:].view(3, 1, 64, 1, 128).unbind(0)
    inputs = {"q": q, "f": f, "v": v, "lower_bound": torch.rand(129, device="cuda")[1:].view(1, 128)}
    wanted = {name: x.clone() for name, x in inputs.items()}
    assert_equal(run(hgrn2_scan, inputs), run(hgrn2_scan, wanted))


def test_boundaries_of_any_stride_beside_closed_gates():
    inputs = on_gpu(tied_inputs(1, 200, 2, 128, 128, dtype=torch.bfloat16, cu_seqlens=[0, 70, 200]))
    inputs["f"] -= 30
    bounds = inputs["cu_seqlens"]
    strided = inputs | {"cu_seqlens": torch.stack((bounds, torch.zeros_like(bounds)), 1)[:, 0]}
    assert_equal(run(hgrn2_scan, strided), run(hgrn2_scan, inputs))


def test_a_thread_that_has_not_used_the_gpu():
    inputs = on_gpu(tied_inputs(1, 200, 2, 128, 128, dtype=torch.bfloat16))
    wanted = hgrn2_scan(**inputs)[0]
    found = []
    worker = threading.Thread(target=lambda: found.append(hgrn2_scan(**inputs)[0]))
    worker.start()
    worker.join()
    assert torch.equal(found[0], wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_inputs_on_a_device_that_is_not_current():
    inputs = Case(hgrn2_scan, torch.bfloat16, 300, 128, 128).inputs()
    elsewhere = {name: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    found, wanted = ({name: x.cpu() for name, x in run(hgrn2_scan, given).items()} for given in (elsewhere, inputs))
    assert_equal(found, wanted)


@both_operators
def test_slow_decay_over_a_long_sequence(op):
    inputs = slow(INPUTS[op](1, 20_000, 1, 16, 16))
    inputs = on_gpu(inputs)
    with torch.no_grad():
        assert_close(run(op, inputs, gradients=False), exact(op, inputs, gradients=False), ORDINARY_RMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@both_operators
def test_any_strides(op, dtype):
    inputs = on_gpu(INPUTS[op](2, 200, dtype=dtype, k_width=128, v_width=128))
    wanted = run(op, inputs)
    for turn in range(3):
        strided = {}
        for i, (name, x) in enumerate(inputs.items()):
            if x is None:
                strided[name] = None
                continue
            # the last axis outermost, then every second element of a wider one, then the first two exchanged
            strided[name] = (
                x.movedim(-1, 0).contiguous().movedim(0, -1),
                torch.stack((x, x), -1).flatten(-2)[..., ::2],
                x.transpose(0, 1).contiguous().transpose(0, 1),
            )[(i + turn) % 3]
        assert_close(run(op, strided), wanted, SAME_RMS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("reverse", [False, True])
def test_slices_of_one_projection(dtype, reverse):
    heads, width = 4, 128
    # rows at addresses that are not multiples of 16 bytes
    projection = torch.randn(2, 150, 3 * heads * width + 1, device="cuda").to(dtype)[..., 1:]
    parts = [x.unflatten(-1, (heads, width)) for x in projection.chunk(3, -1)]
    inputs = dict(zip("qfv", parts, strict=True)) | {"lower_bound": torch.full((heads, width), 0.5, device="cuda")}
    whole = {name: x.contiguous() for name, x in inputs.items()}
    assert_close(run(hgrn2_scan, inputs, reverse=reverse), run(hgrn2_scan, whole, reverse=reverse), SAME_RMS[dtype])


def test_packed_bounds_of_any_stride_and_size():
    inputs = Case(hgrn2_scan, torch.float32, 1000, 32, 64, cu_seqlens=CU_SEQLENS).inputs()
    wanted = run(hgrn2_scan, inputs)
    bounds = inputs["cu_seqlens"]
    for other in (bounds.long(), torch.stack((bounds, torch.zeros_like(bounds)), 1)[:, 0]):
        assert_close(run(hgrn2_scan, inputs | {"cu_seqlens": other}), wanted, SAME_RMS[torch.float32])


MANY = torch.randint(0, 300, (5000,), generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 200], [0, 0, 1, 65, 65, 129, 200, 200], [0, 64, 200], [0, 1000], [-100, 200], [0, 300, 100], [0, 50, 200],
        [200, 0], [0, *MANY], [0, 100_000, *(100_000 + x for x in MANY[:1500])],
    ],
    ids=lambda bounds: f"{len(bounds) - 1}-to-{bounds[-1]}",
)  # fmt: skip
def test_spans_of_packed_sequences(bounds, dtype, reverse):
    length = 200 if len(bounds) < 20 else bounds[-1]
    sequences, cu_seqlens = len(bounds) - 1, torch.tensor(bounds, dtype=dtype, device="cuda")
    most = num_chunks(length, sequences)
    found, num_spans = torch.empty(most, 4, dtype=torch.int32, device="cuda"), torch.empty(1, dtype=torch.int32).cuda()
    settings = Settings(torch.bfloat16, "silu", True, Floor.of(None))
    one = LaunchList(lambda name: cuda_kernel(name, settings, 0))
    arguments = PackedArguments(
        length=length, sequences=sequences, most=most, heads=1, wide=dtype == torch.int64, reverse=reverse
    )
    places = [BufferRef(name) for name in ("cu_seqlens", "spans", "num_spans")] + [NULL] * PackedArguments.OUTPUTS
    one.launch("cut_sequences", (1, 1, 1), arguments, *places)
    run_launches(one, cu_seqlens.device, cu_seqlens=cu_seqlens, spans=found, num_spans=num_spans)
    spans = found[: int(num_spans)].tolist()
    rows, expected = [], []
    for row, left, sequence, ends in spans:
        count = min(left, CHUNK)
        rows += [(sequence, row - i if reverse else row + i) for i in range(count)]
        assert left > 0
        assert (ends >> 1 == 1) == (left <= CHUNK)
    # whatever the boundaries say, every row lies within, and sequences follow each other
    clamped = [min(max(bound, 0), length) for bound in bounds]
    for sequence, (start, stop) in enumerate(pairwise(clamped)):
        inside = list(range(start, stop))
        expected += [(sequence, row) for row in (reversed(inside) if reverse else inside)]
    assert rows == expected
    assert sum(ends & 1 for *_, ends in spans) == sum(b > a for a, b in pairwise(clamped))


@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(op, reverse):
    inputs = Case(op, torch.float32, 1000, 32, 64, cu_seqlens=CU_SEQLENS).inputs()

    def one_by_one(initial_state, cu_seqlens, **inputs):
        outputs, states = [], []
        for n, (start, stop) in enumerate(pairwise(CU_SEQLENS)):
            part = {name: x[:, start:stop] if name in BY_TOKEN else x for name, x in inputs.items()}
            y, state = op(**part, initial_state=initial_state[n : n + 1], reverse=reverse)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    assert_close(run(op, inputs, reverse=reverse), run(one_by_one, inputs), ORDINARY_RMS)


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_same_bits_twice_whatever_memory_holds(op, packed, dtype):
    inputs = Case(op, dtype, 1000, 128, 128, heads=4, cu_seqlens=CU_SEQLENS if packed else None).inputs()
    first = run(op, inputs)
    assert_equal(run(op, inputs), first)
    # and without the filling: what earlier tensors left behind, zeros, large numbers
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for value in (0.0, 1e30):
        torch.cuda.empty_cache()
        blocks = [torch.full((1 << 24,), value, device="cuda") for _ in range(8)]
        blocks += [torch.full((1 << 16,), value, device="cuda") for _ in range(64)]
        del blocks
        assert_equal(run(op, inputs), first)


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_never_waits_for_the_gpu(op, packed):
    inputs = Case(op, torch.bfloat16, 1000, 128, 128, heads=4, cu_seqlens=CU_SEQLENS if packed else None).inputs()
    leaves = {name: x.requires_grad_() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]

    def work():
        y, state = op(**leaves)
        return torch.autograd.grad((y, state), wanted, (torch.ones_like(y), torch.ones_like(state)))

    first = work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_a_captured_scan_follows_its_inputs(op, packed, gradients):
    inputs = Case(op, torch.bfloat16, 200, 128, 128, cu_seqlens=(0, 50, 50, 200) if packed else None).inputs()
    leaves = [x.requires_grad_(gradients) for x in inputs.values() if x is not None and x.is_floating_point()]
    dy = torch.randn_like(inputs["v"])

    def work():
        y, state = op(**inputs)
        found = [
            y,
            state,
            *(torch.autograd.grad((y, state), leaves, (dy, torch.ones_like(state))) if gradients else ()),
        ]
        return {str(i): x.detach() for i, x in enumerate(found)}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    if packed:
        # the bounds may move too: only their number is part of the graph
        inputs["cu_seqlens"].copy_(torch.tensor([0, 0, 130, 200], dtype=torch.int32))
    with torch.no_grad():
        inputs["v"].normal_()
    dy.normal_()
    graph.replay()
    assert_equal(found, work())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 32), (torch.bfloat16, 32), (torch.bfloat16, 128)],
    ids=["f32", "bf16", "bf16-128"],
)
@pytest.mark.parametrize(
    ("op", "name"),
    [(hgrn2_scan, "q"), (hgrn2_scan, "f"), (hgrn2_scan, "v"), (gated_scan, "k")],
    ids=["q", "f", "v", "k"],
)
def test_bad_values_stay_in_their_rows_and_head(op, name, dtype, width, reverse):
    inputs = on_gpu(INPUTS[op](2, 200, 2, width, width, dtype=dtype))
    for value in (float("nan"), float("inf")):
        for at in (0, 63, 64, 100, 199):
            bad = inputs | {name: inputs[name].clone()}
            bad[name][1, at, 1, 2] = value
            y, state = op(**bad, reverse=reverse)
            # float32: the recurrence then has the infinities that the values call for, and no others
            wide = {key: x.float() if x is not None and x.is_floating_point() else x for key, x in bad.items()}
            wanted, wanted_state = op(**wide, reverse=reverse, backend="reference")
            assert torch.equal(y.isfinite(), wanted.isfinite()), (value, at)
            assert torch.equal(state.isfinite(), wanted_state.isfinite()), (value, at)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=["float32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("k_width", "v_width"), [(16, 64), (64, 16), (128, 128), (256, 128), (128, 256), (20, 96), (1, 1)]
)
def test_step(k_width, v_width, dtype):
    inputs = on_gpu(tied_inputs(3, 1, 4, k_width, v_width, dtype=dtype))
    step = {name: inputs[name][:, 0] for name in "qfv"} | {name: inputs[name] for name in ("lower_bound",)}
    step["state"] = inputs["initial_state"]
    settings = {"scale": 0.7, "v_activation": "silu"}
    wanted = run(hgrn2_step, step, dtype=torch.float64, backend="reference", gradients=False, **settings)
    found = run(hgrn2_step, step, gradients=False, **settings)
    assert found["y"].dtype == dtype
    # one rounding of y; the state is float32 all along
    rounding = ORDINARY_RMS if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(found["y"], wanted["y"]).rms <= rounding
    assert relative_error(found["final_state"], wanted["final_state"]).rms <= ORDINARY_RMS
    with torch.no_grad():
        y, state = hgrn2_step(**step, inplace=True, **settings)
    assert state is step["state"]
    assert_equal({"y": y, "final_state": state}, found)


def test_gradients_of_a_step():
    inputs = on_gpu(tied_inputs(3, 1, 2, 32, 48))
    step = {name: inputs[name][:, 0] for name in "qfv"} | {"lower_bound": inputs["lower_bound"]}
    step["state"] = inputs["initial_state"]
    assert_close(run(hgrn2_step, step), exact(hgrn2_step, step), ORDINARY_RMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_captured_steps_in_place(dtype):
    steps, shape = 5, (8, 4, 64)
    q, f, v = torch.randn(3, steps, *shape, device="cuda").to(dtype).unbind(0)
    bound = torch.full(shape[1:], 0.5, device="cuda")
    state = torch.randn(*shape, 64, device="cuda")
    expected_state = state.clone()

    @torch.no_grad()
    def decode(state):
        return [hgrn2_step(q[t], f[t], v[t], state, bound, inplace=True)[0] for t in range(steps)]

    expected = [torch.stack(decode(expected_state)) for _ in range(3)]
    kept = state.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode(state)
    torch.cuda.current_stream().wait_stream(side)
    state.copy_(kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = decode(state)
    assert torch.equal(state, kept)
    for wanted in expected:
        graph.replay()
        assert torch.equal(torch.stack(rows), wanted)
    assert torch.equal(state, expected_state)


def test_steps_match_the_scan():
    inputs = on_gpu(tied_inputs(2, 20, 2, 16, 16))
    whole, end = hgrn2_scan(**inputs)
    state = inputs["initial_state"]
    for t in range(20):
        y, state = hgrn2_step(inputs["q"][:, t], inputs["f"][:, t], inputs["v"][:, t], state, inputs["lower_bound"])
        assert relative_error(y, whole[:, t]).rms <= ORDINARY_RMS
    assert relative_error(state, end).rms <= ORDINARY_RMS


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    # rows, and elements of one batch entry after the other, whose places do not fit 32 bits
    batch, length, heads, width = 9, 1 << 17, 16, 128
    assert batch * length * heads * width > 2**31
    q, f, v = (torch.randn(batch, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bound = torch.full((heads, width), 0.5, device="cuda")
    with torch.no_grad():
        y, state = hgrn2_scan(q, f, v, bound)
        for b in (0, batch - 1):
            alone, end = hgrn2_scan(q[b : b + 1].clone(), f[b : b + 1].clone(), v[b : b + 1].clone(), bound)
            assert torch.equal(y[b, -100:], alone[0, -100:])
            assert torch.equal(state[b], end[0])
        rows = slice(length - 3000, length)
        # nothing of what came before is left after 2,900 tokens of such gates
        part = (x[-1:, rows].double() for x in (q, f, v))
        wanted, _ = hgrn2_scan(*part, bound, backend="reference")
        assert relative_error(y[-1:, -100:], wanted[:, -100:]).rms <= 1e-2


@pytest.mark.large
def test_one_row_of_more_than_two_to_the_31_elements():
    length, heads, width = (1 << 20) + 70, 16, 128
    assert length * heads * width > 2**31
    q, f, v, dy = (torch.randn(1, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    # and gates too near to 0 for the usual way, which other kernels take up
    f[:, -150:-100] -= 20.0

    def scan(*inputs, dy):
        leaves = [x.requires_grad_() for x in inputs]
        y, state = hgrn2_scan(*leaves)
        return state.detach(), (y.detach(), *torch.autograd.grad(y, leaves, dy))

    state, by_token = scan(q, f, v, dy=dy)
    h = slice(heads - 1, heads)
    end, alone = scan(*(x.detach()[:, :, h].clone() for x in (q, f, v)), dy=dy[:, :, h].clone())
    assert relative_error(state[:, h], end).rms <= SAME_RMS[torch.bfloat16]
    for found, wanted in zip(by_token, alone, strict=True):
        for rows in (slice(0, 1000), slice(length - 1000, length)):
            assert relative_error(found[:, rows, h], wanted[:, rows]).rms <= SAME_RMS[torch.bfloat16]


@pytest.mark.large
def test_heads_far_apart():
    # the third head begins 2**31 elements after the first; a place lost to 32 bits would end this process's use of the
    # GPU, so that another does it
    code = textwrap.dedent("""
        import os
        import torch
        from hgrn2.ops import hgrn2_scan
        memory = torch.empty(3 * 2**30 + 2**20, dtype=torch.bfloat16, device="cuda")
        for width in (16, 128):
            far = memory.as_strided((1, 100, 3, width), (1, width, 2**30, 1)).copy_(torch.randn(1, 100, 3, width))
            grads = []
            for x in (far, far.contiguous()):
                leaf = x.detach().requires_grad_()
                y, state = hgrn2_scan(leaf, leaf, leaf, torch.full((3, width), 0.5, device="cuda"))
                grads.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), leaf)))
            for found, wanted in zip(*grads):
                assert ((found - wanted).float().norm() <= 4e-3 * wanted.float().norm()).item()
        # end without finalization: autograd's threads may still release Python objects, which aborts the process then
        os._exit(0)
    """)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_million_tokens():
    length, tail = 1 << 20, 1000
    generator = torch.Generator("cuda").manual_seed(0)
    q, f, v, dy = torch.randn(4, 1, length, 1, 64, device="cuda", generator=generator).unbind(0)
    bound = torch.full((1, 64), 0.5, device="cuda")
    leaves = tuple(x.clone().requires_grad_() for x in (q, f, v))
    y, end = hgrn2_scan(*leaves, bound)
    grads = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        _, before = hgrn2_scan(*(x[:, :-tail] for x in leaves), bound)
    # what follows from there, step by step: outputs, and gradients, which come from later tokens alone
    part = tuple(x[:, -tail:].detach().double().requires_grad_() for x in leaves)
    wanted, wanted_end = hgrn2_scan(*part, bound, initial_state=before.double(), backend="reference")
    wanted_grads = torch.autograd.grad(wanted, part, dy[:, -tail:].double())
    assert relative_error(y[:, -tail:], wanted).rms <= ORDINARY_RMS
    assert relative_error(end, wanted_end).rms <= ORDINARY_RMS
    for found, one in zip(grads, wanted_grads, strict=True):
        assert relative_error(found[:, -tail:], one).rms <= ORDINARY_RMS
    assert all(x.isfinite().all() for x in (y, *grads))


def small_model() -> HGRN2LM:
    torch.manual_seed(0)
    return HGRN2LM(presets.tiny(vocab_size=64, hidden_size=128, num_hidden_layers=2, intermediate_size=128)).cuda()


# torch's compiler warns of its own ways and of the card's
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_memory")
def test_gradients_of_a_compiled_model_equal_eager_ones():
    model = small_model()
    ids = torch.randint(0, 64, (2, 200), device="cuda")
    torch.compiler.reset()
    results = []
    for loss_of in (model.loss, torch.compile(model.loss, fullgraph=True)):
        loss, count, _ = loss_of(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.compiler.reset()
    assert len(results[0]) == len(list(model.parameters()))
    # what a compiler fuses is rounded elsewhere, and layers multiply that
    assert_close(results[1], results[0], 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_memory")
@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize(
    # a compiler may keep digits between element-wise operations that eager rounds away
    ("dtype", "width", "rms"),
    [(torch.float32, 32, ORDINARY_RMS), (torch.bfloat16, 128, 1e-2)],
    ids=["float32", "bf16"],
)
def test_a_compiled_operator_equals_eager(op, packed, dtype, width, rms):
    def function(q, initial_state, **inputs):
        y, state = op(q=2 * q, initial_state=initial_state.sin(), **inputs)
        return y * 0.5 + 1, state.cos()

    inputs = Case(op, dtype, 200, width, width, cu_seqlens=(0, 50, 50, 200) if packed else None).inputs()
    torch.compiler.reset()
    found = run(torch.compile(function, fullgraph=True), inputs)
    torch.compiler.reset()
    assert_close(found, run(function, inputs), rms)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_learns_under_autocast(compiled):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 64, (2, 200), device="cuda")
    loss_of = torch.compile(model.loss, fullgraph=True) if compiled else model.loss
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss, count, _ = loss_of(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach() / count))
    assert losses[-1] < losses[0] - 0.3


def test_a_model_on_the_gpu_has_the_logits_of_the_cpu():
    model = small_model().cpu().eval()
    ids = torch.randint(0, 64, (2, 150))
    with torch.no_grad():
        expected, _ = model(ids)
        model.cuda()
        found, state = model(ids[:, :100].cuda())
        parts = [found]
        for t in range(100, 150):
            logits, state = model.step(ids[:, t].cuda(), state)
            parts.append(logits.unsqueeze(1))
    assert relative_error(torch.cat(parts, 1).cpu(), expected).rms <= EXTREME_RMS
