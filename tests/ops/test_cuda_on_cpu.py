"""The CUDA kernels' own code without a GPU, thread by thread, against the float64 recurrence. See `cuda_emulator.h`."""

from __future__ import annotations

import ctypes
import itertools
import platform
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hgrn2.ops import hgrn2_scan
from hgrn2.ops.backends import find, registered
from hgrn2.ops.backends.cuda import CudaBackend, launch, launch_list, plan, schedule
from hgrn2.ops.backends.cuda import kernels as cuda_kernels
from hgrn2.ops.call import ScanCall, ScanSettings
from tests.numerics import assert_close, assert_equal, assert_no_worse, relative_error, run
from tests.ops.cuda_emulator import Emulator
from tests.ops.scan_cases import honest, spread, tied_inputs, unchecked

pytestmark = [
    # the first run compiles the kernels, as plain C++
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux" or not shutil.which("g++"), reason="the kernels are emulated with Linux and g++"
    ),
]


@pytest.fixture(scope="module")
def emulator(request):
    """An emulator whose builds are cached beside pytest's own cache."""
    return Emulator(request.config.cache.mkdir("cuda-emulator"))


class EmulatedBackend(CudaBackend):
    """The CUDA kernels on the CPU."""

    def rejects(self, traits):
        """A scan from pre-activations, as on a GPU."""
        return None if traits.is_tied and not traits.is_step else "no kernel"


@pytest.fixture
def kernels(emulator, monkeypatch):
    """Tensors of the CPU go to the CUDA kernels."""
    monkeypatch.setattr(cuda_kernels, "compiled", emulator.compiled)
    monkeypatch.setattr(cuda_kernels, "begin", lambda *_: None)
    monkeypatch.setattr(launch, "current_stream", lambda _: 0)
    monkeypatch.setattr(emulator, "seed", 0)
    emulator.made.clear()
    # they were made with the numbers of another test
    for found in (schedule.forward_launches, schedule.backward_launches):
        found.cache_clear()
    # fills fresh memory with what is not a number
    torch.use_deterministic_algorithms(True)
    with registered(EmulatedBackend(), auto_order=("cuda",)):
        yield emulator
    torch.use_deterministic_algorithms(False)


def exact(inputs, **settings):
    return run(hgrn2_scan, inputs, dtype=torch.float64, backend="reference", **settings)


@dataclass(frozen=True)
class Case:
    """A call. `shift` is added to the gates: far below 0 they are too near to 0 for dense products."""

    length: int = 130
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    shift: float | str = 0.0
    reverse: bool = False
    bound: float | None = 0.9
    cu_seqlens: tuple[int, ...] | None = None
    min_log_decay: float | None = None

    def inputs(self) -> dict[str, Any]:
        cu_seqlens = None if self.cu_seqlens is None else list(self.cu_seqlens)
        shape = (self.batch, self.length, self.heads, 128, 128)
        inputs = tied_inputs(*shape, dtype=self.dtype, bound=self.bound, cu_seqlens=cu_seqlens)
        shift = spread(inputs["f"].shape, (-30.0, 0.0, 8.0)) if self.shift == "wild" else self.shift
        return inputs | {"f": (inputs["f"] + shift).to(self.dtype)}


PACKED = (0, 0, 1, 65, 65, 65, 129, 190, 190)
CASES = [
    *(Case(length, batch=2, reverse=length % 2 == 1) for length in (1, 15, 63, 64, 65, 130, 200)),
    Case(1, batch=40),
    *(Case(shift=s, bound=b, reverse=True) for s in (-2.0, -6.0, -20.0, 6.0, "wild") for b in (None, 0.9)),
    # gates of about 0.12 and 0.05, of which a half of a chunk keeps too little, a block of 16 tokens enough
    *(Case(length, shift=shift, bound=b) for length in (33, 190) for shift in (-2.0, -2.5) for b in (None, 0.03)),
    *(Case(190, shift=s, bound=None, cu_seqlens=PACKED) for s in (0.0, -2.0, -6.0, "wild")),
    *(Case(190, shift=s, reverse=True, cu_seqlens=PACKED) for s in (0.0, -2.0, -6.0, "wild")),
    *(Case(190, dtype=torch.float16, shift=shift, bound=None) for shift in (0.0, -6.0)),
    *(Case(shift=s, bound=b, min_log_decay=-3.0) for s, b in ((0.0, None), (-6.0, 0.9), ("wild", 0.1))),
    # that hold nearly every gate, of which some lose less; and that leave too little for dense products
    *(Case(190, shift=s, reverse=True, min_log_decay=-1e-4, cu_seqlens=c) for s, c in ((0.0, PACKED), (8.0, None))),
    *(Case(190, shift=s, bound=b, min_log_decay=-12.0) for s, b in ((-20.0, 0.1), ("wild", None))),
    Case(190, dtype=torch.float16, shift=-6.0, bound=None, min_log_decay=-3.0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(kernels, case):
    inputs = case.inputs()
    # gradients in float16 are the Triton kernels'
    floor = {"min_log_decay": case.min_log_decay}
    settings: dict[str, Any] = floor | {"gradients": case.dtype == torch.bfloat16, "reverse": case.reverse}
    wanted = exact(inputs, **settings)
    rival = {name: x for name, x in honest(hgrn2_scan, inputs, case.reverse, **floor).items() if name in wanted}
    assert_no_worse(run(hgrn2_scan, inputs, **settings), rival, wanted)


@pytest.mark.parametrize(("others", "closed"), [(0.0, (-1,)), (14.0, (-1,)), (20.0, (5, 70)), (-14.0, ())])
@pytest.mark.parametrize("z", [-9.0, -12.0, -20.0, -30.0])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_few_closed_gates_without_a_bound(kernels, others, closed, z, length):
    # the gradient by a gate is of the gate's size, whatever the others of its chunk are
    inputs = Case(length, bound=None).inputs()
    f = torch.full_like(inputs["f"], others)
    for at in closed:
        f[:, min(at, length - 1)] = z
    inputs["f"] = f + 0.1 * inputs["f"]
    assert_close(run(hgrn2_scan, inputs), exact(inputs), 5e-3)


@pytest.mark.parametrize("shift", [0.0, -2.0])
@pytest.mark.parametrize("bound", [None, 1e-6])
@pytest.mark.parametrize("ordinary", [False, True])
def test_closed_gates_among_others(kernels, bound, shift, ordinary):
    # some gates of some channels are closed and the others wide open, or, in other warps, ordinary; then, and without a
    # bound, gradients are found by dense products
    inputs = Case(190, shift=shift, bound=bound).inputs()
    inputs["f"][:, 64 : 72 if ordinary else 128, :, :5] = 14.0
    inputs["f"][:, 64:68, :, :5] = -9.5
    first = run(hgrn2_scan, inputs)
    assert_close(first, exact(inputs), 5e-3)
    for kernels.seed in range(1, 4):
        assert_equal(run(hgrn2_scan, inputs), first)


@pytest.mark.parametrize("z", [9.0, 14.0, 20.0])
@pytest.mark.parametrize("padding", [0, 1, 10])
def test_closed_gates_beside_padding(kernels, z, padding):
    # gates that are closed or wide open have small gradients; ordinary ones, of tokens nobody asks for, have none
    inputs = Case(64, bound=None).inputs()
    f = torch.full_like(inputs["f"], z)
    f[:, (5, 40)] = -z
    f[:, 64 - padding :] = 0.0
    inputs["f"] = f + 0.1 * inputs["f"]
    dy = torch.randn_like(inputs["v"])
    dy[:, 64 - padding :] = 0.0
    found, wanted = gradients(inputs, dy), gradients(inputs, dy, torch.float64, backend="reference")
    assert_close(found, wanted, 5e-3)
    assert relative_error(found["f"][:, (5, 40)], wanted["f"][:, (5, 40)]).rms < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shift", [0.0, -2.0, "wild"])
def test_a_bound_whose_gradient_is_not_wanted(kernels, shift, compiled):
    torch.compiler.reset()
    op = torch.compile(hgrn2_scan, fullgraph=True, backend="aot_eager") if compiled else hgrn2_scan
    inputs = Case(190, shift=shift, bound=0.03).inputs()
    dy = torch.randn_like(inputs["v"])
    wanted = gradients(inputs, dy, torch.float64, backend="reference")
    assert_close(gradients(inputs, dy, op=op), wanted, 5e-3)
    assert "sum_bounds" not in kernels.made


def gradients(inputs, dy, dtype=torch.bfloat16, op=hgrn2_scan, **settings):
    """Return gradients of all inputs but the bound, for a gradient of the outputs alone."""
    high = torch.promote_types(dtype, torch.float32)
    leaves = {name: inputs[name].to(dtype).requires_grad_() for name in "qfv"}
    leaves["initial_state"] = inputs["initial_state"].to(high).requires_grad_()
    bound = None if inputs["lower_bound"] is None else inputs["lower_bound"].to(high)
    y, _ = op(**leaves, lower_bound=bound, **settings)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))


# multiprocessors (and programs of the exact gradients, which then have several chunks each), states kept at a time,
# shortest walk; the launches that tell which way was gone
CUTS = [(1, 2048, 8, set()), (1, 2, 1, set()), (4, 4, 1, {"carry_states"}), (132, 2048, 8, {"carry_states"})]


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "parts", "segments and parts", "segments"])
@pytest.mark.parametrize("shift", [0.0, "wild"])
@pytest.mark.parametrize("packed", [False, True])
def test_however_the_work_is_cut(kernels, monkeypatch, cut, shift, packed):
    for name, number in zip(("MULTIPROCESSORS", "MAX_STATES", "MIN_SEGMENT_CHUNKS"), cut, strict=False):
        monkeypatch.setattr(plan, name, number)
    case = Case(300, heads=2, shift=shift, cu_seqlens=(0, 70, 70, 300) if packed else None)
    inputs = case.inputs()
    assert_close(run(hgrn2_scan, inputs), exact(inputs), 5e-3)
    assert kernels.made & {"carry_states"} == cut[-1]


@pytest.mark.parametrize("shift", [0.0, "wild"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_bits_in_every_schedule(kernels, packed, shift):
    inputs = Case(190, shift=shift, cu_seqlens=PACKED if packed else None).inputs()
    first = run(hgrn2_scan, inputs)
    for seed in range(1, 5):
        kernels.seed = seed
        assert_equal(run(hgrn2_scan, inputs), first)


@pytest.mark.parametrize("shift", [0.0, -2.0, -6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_where_they_belong(kernels, bad, shift):
    inputs = Case(200, shift=shift).inputs()
    y, state = hgrn2_scan(**inputs)
    inputs["v"][0, 100, 0, 3] = bad
    found, found_state = hgrn2_scan(**inputs)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[:, 100:, :, 3] = True
    assert torch.equal(found[~touched], y[~touched])
    assert not found[0, 100, 0, 3].isfinite()
    others = torch.arange(128) != 3
    assert torch.equal(found_state[..., others], state[..., others])
    assert not found_state[..., 3].isfinite().any()


@pytest.mark.parametrize("shift", [0.0, -2.0, -6.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_stay_where_they_belong(kernels, monkeypatch, bad, shift):
    # one walk
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    inputs = Case(200, shift=shift).inputs()
    v, initial = (inputs[name].requires_grad_() for name in ("v", "initial_state"))
    y, _ = hgrn2_scan(**inputs)
    dy = torch.randn_like(y)
    dv, d_initial = torch.autograd.grad(y, (v, initial), dy, retain_graph=True)
    dy[0, 100, 0, 3] = bad
    found, found_initial = torch.autograd.grad(y, (v, initial), dy)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[:, :101, :, 3] = True
    # the chunk goes another way than without it, so it and those before it agree but for rounding
    assert torch.equal(found[:, 128:], dv[:, 128:])
    assert relative_error(found[~touched], dv[~touched]).rms < 5e-3
    assert not found[touched].isfinite().any()
    others = torch.arange(128) != 3
    assert relative_error(found_initial[..., others], d_initial[..., others]).rms < 5e-3
    assert not found_initial[..., 3].isfinite().any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bound", [None, 0.9])
def test_gradients_reach_every_input(kernels, bound, state, packed, compiled):
    cu_seqlens = [0, 0, 70, 130] if packed else None
    inputs = tied_inputs(1, 130, 1, 128, 128, dtype=torch.bfloat16, bound=bound, state=state, cu_seqlens=cu_seqlens)
    torch.compiler.reset()
    op = torch.compile(hgrn2_scan, fullgraph=True, backend="aot_eager") if compiled else hgrn2_scan
    assert_close(run(op, inputs, reverse=True, scale=0.7), exact(inputs, reverse=True, scale=0.7), 5e-3)


@pytest.mark.parametrize("used", [0, 1], ids=["outputs", "final state"])
def test_gradients_of_one_output(kernels, used):
    def one(**inputs):
        return hgrn2_scan(**inputs)[used : used + 1]

    def exact_one(**inputs):
        return hgrn2_scan(**inputs, backend="reference")[used : used + 1]

    inputs = Case().inputs()
    found = run(one, inputs, outputs=("y",))
    wanted = run(exact_one, inputs, outputs=("y",), dtype=torch.float64)
    if used == 1:
        # the final state has no query in it
        assert found.pop("d_q").count_nonzero() == wanted.pop("d_q").count_nonzero() == 0
    assert_close(found, wanted, 5e-3)


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_activations(kernels, activation):
    inputs = Case(70).inputs()
    found, wanted = run(hgrn2_scan, inputs, q_activation=activation), exact(inputs, q_activation=activation)
    assert_close(found, wanted, 5e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_activation_of_values(kernels, compiled):
    # applied before the operator, also in a trace
    inputs = Case(70).inputs()
    settings = {"v_activation": "silu", "min_log_decay": -3.0}
    torch.compiler.reset()
    op = torch.compile(hgrn2_scan, fullgraph=True, backend="aot_eager") if compiled else hgrn2_scan
    assert_no_worse(run(op, inputs, **settings), honest(hgrn2_scan, inputs, **settings), exact(inputs, **settings))
    assert "forward_outputs" in kernels.made


def test_a_floor_near_1_over_a_long_sequence(kernels):
    # decays at the floor are rounded, and all alike
    inputs = Case(1500, bound=None).inputs()
    inputs["f"] = torch.full_like(inputs["f"], -5.0)
    inputs["initial_state"] = torch.ones_like(inputs["initial_state"])
    inputs["v"] = torch.zeros_like(inputs["v"])
    settings: dict[str, Any] = {"min_log_decay": -1e-4, "gradients": False}
    found, wanted = run(hgrn2_scan, inputs, **settings), exact(inputs, **settings)
    assert relative_error(found["final_state"], wanted["final_state"]).rms < 1e-6


def test_calls_that_differ_share_no_launches(kernels):
    inputs, packed, other = (Case(70, cu_seqlens=cut).inputs() for cut in (None, (0, 70), (0, 30, 70)))
    wide = packed | {"cu_seqlens": packed["cu_seqlens"].long()}
    apart = [{name: torch.cat((inputs[name], inputs[name]), 2)[:, :, :1]} for name in "qfv"]
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (inputs, {}), (inputs | {"lower_bound": None}, {}), (inputs | {"initial_state": None}, {}), (packed, {}),
        (wide, {}), (other, {}), *((inputs | x, {}) for x in apart), (inputs, {"scale": 0.3}),
        (inputs, {"reverse": True}), (inputs, {"q_activation": "none"}), (inputs, {"min_log_decay": -3.0}),
    ]  # fmt: skip
    for given, settings in (*calls, calls[0]):
        assert_close(run(hgrn2_scan, given, **settings), exact(given, **settings), 5e-3)
    # the first call's was there when it came again
    assert schedule.forward_launches.cache_info()[:2] == schedule.backward_launches.cache_info()[:2] == (1, len(calls))


def test_outputs_gradients_that_differ_share_no_launches(kernels):
    inputs = Case(70).inputs()
    leaf, dy = inputs["v"].requires_grad_(), torch.randn_like(inputs["v"])
    apart, expanded = torch.cat((dy, dy), 2)[:, :, :1], dy[:, :1].expand_as(dy)

    def gradient(given, op, last):
        y, state = op(**inputs)
        (grad,) = torch.autograd.grad(
            (y, state) if last else y, leaf, (given, torch.ones_like(state)) if last else given
        )
        return grad

    for given, last in ((dy, False), (apart, False), (expanded, False), (dy, True), (dy, False)):
        wanted = gradient(given, partial(hgrn2_scan, backend="reference"), last)
        assert relative_error(gradient(given, hgrn2_scan, last), wanted).rms <= 5e-3
    assert schedule.backward_launches.cache_info()[:2] == (1, 4)


def test_strided_inputs(kernels):
    # slices of one projection, whose rows begin at multiples of 16 bytes, and at none
    for shift in (0, 1):
        projection = torch.randn(2, 100, 3 * 256 + shift).bfloat16()[..., shift:]
        parts = [x.unflatten(-1, (2, 128)) for x in projection.chunk(3, -1)]
        inputs = dict(zip("qfv", parts, strict=True)) | {"lower_bound": torch.full((2, 128), 0.5)}
        whole = {name: x.contiguous() for name, x in inputs.items()}
        assert_equal(run(hgrn2_scan, inputs), run(hgrn2_scan, whole))


@pytest.mark.parametrize("kind", ["expanded", "slice", "layer", "turned"])
def test_a_bound_of_any_strides(kernels, kind):
    inputs = Case(70, heads=2).inputs()
    bound = inputs["lower_bound"]
    inputs["lower_bound"] = {
        "expanded": bound[:1].expand(2, 128),
        "slice": torch.cat((bound, bound + 0.1), 1)[:, :128],
        "layer": torch.stack((bound, bound), 1)[:, 1],
        "turned": bound.T.contiguous().T,
    }[kind]
    assert_close(run(hgrn2_scan, inputs), exact(inputs), 5e-3)


@pytest.mark.parametrize("bounds", [
    [0, 200, 0, 200], [0, 1000], [-100, 200], [0, 300, 100], [200, 0], [5, 70, 100], [0, 150, 0, 150, 0, 200]
])  # fmt: skip
def test_boundaries_that_do_not_fit_touch_no_other_memory(kernels, monkeypatch, bounds):
    inputs = Case(200, cu_seqlens=tuple(bounds)).inputs()
    made = []

    def guarded(shape, *args, empty=torch.empty, **kwargs):
        """Room within more room, which holds a number that nobody writes."""
        shape = torch.Size((shape,) if isinstance(shape, int) else shape)
        size = shape.numel()
        whole = empty(size + 2**15, *args, **kwargs).fill_(12345)
        made.append((whole, size))
        return whole[:size].view(shape)

    def alone(self, num_bytes, zeros=False, workspace=launch_list.LaunchList.workspace):
        """A workspace in memory of its own."""
        if zeros:
            return workspace(self, num_bytes, zeros)
        name = f"workspace {len(self.sizes)}"
        self.sizes[name] = num_bytes
        return launch_list.BufferRef(name)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(launch_list.LaunchList, "workspace", alone)
    found = run(unchecked(hgrn2_scan, "cuda"), inputs)
    assert made
    assert all((whole[size:] == whole.new_tensor(12345)).all() for whole, size in made)
    # nothing of what was there before is left; rows of no sequence are zeros
    assert all((x.isfinite() & (x != x.new_tensor(12345))).all() for x in found.values())
    covered = torch.zeros(200, dtype=torch.bool)
    for start, end in itertools.pairwise(bounds):
        covered[max(0, start) : max(0, end)] = True
    for name in ("y", "d_q", "d_f", "d_v"):
        assert not found[name][:, ~covered].any()


class Watched(TorchDispatchMode):
    """Sees operators, which some other modes need to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.add(str(func))
        return func(*args, **kwargs or {})


seen: set[str] = set()


def test_dispatch_modes_see_the_operators(kernels):
    inputs = Case().inputs()
    wanted = run(hgrn2_scan, inputs)
    with Watched():
        assert_equal(run(hgrn2_scan, inputs), wanted)
    assert seen >= {"hgrn2.scan.default", "hgrn2.scan_backward.default"}


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(kernels, monkeypatch, packed):
    # states are kept on the way
    monkeypatch.setattr(plan, "MIN_SEGMENT_CHUNKS", 1)
    monkeypatch.setattr(plan, "MAX_STATES", 1)
    inputs = Case(190, cu_seqlens=PACKED if packed else None).inputs()
    # opcheck runs the operator again and compares every element
    torch.use_deterministic_algorithms(False)
    names = ("q", "f", None, "v", "lower_bound", "initial_state", "cu_seqlens")
    call = ScanCall._make((*(inputs.get(name) for name in names), ScanSettings(packed, 0.5, "silu")))
    checks = ("test_schema", "test_faketensor")
    for needs_grad in (False, True):
        call, coarse = find("cuda").plan(call, needs_grad)
        arguments = ("cuda", coarse, *call.flat())
        torch.library.opcheck(torch.ops.hgrn2.scan.default, arguments, test_utils=checks)
    y, state, kept = torch.ops.hgrn2.scan(*arguments)
    assert kept.shape[1] > 0
    for bound_wanted, d_state in ((True, torch.randn_like(state)), (False, None)):
        arguments = ("cuda", coarse, torch.randn_like(y), d_state, kept, bound_wanted, *call.flat())
        torch.library.opcheck(torch.ops.hgrn2.scan_backward.default, arguments, test_utils=checks)


def test_a_second_derivative_is_refused(kernels):
    inputs = Case(70).inputs()
    q = inputs["q"].requires_grad_()
    (grad,) = torch.autograd.grad(hgrn2_scan(**inputs)[0].float().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'cuda' has no second derivative"):
        grad.float().sum().backward()


def test_sequences_beside_each_other_change_no_bit(kernels, monkeypatch):
    # one walk over both; rounding that one owes is not the other's
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    inputs = Case(400, shift=6.0, cu_seqlens=(0, 200, 400)).inputs()
    wanted = run(hgrn2_scan, inputs)
    changed = inputs | {"f": inputs["f"].clone()}
    changed["f"][:, :200] -= 1.0
    found = run(hgrn2_scan, changed)
    assert torch.equal(found["y"][:, 200:], wanted["y"][:, 200:])
    assert torch.equal(found["final_state"][1], wanted["final_state"][1])
    changed = inputs | {"f": inputs["f"].clone()}
    changed["f"][:, 200:] -= 1.0
    found = run(hgrn2_scan, changed)
    assert torch.equal(found["d_v"][:, :200], wanted["d_v"][:, :200])
    assert torch.equal(found["d_initial_state"][0], wanted["d_initial_state"][0])


def test_no_coarse_states_without_a_gradient(kernels):
    hgrn2_scan(**Case().inputs())
    assert "forward_outputs" in kernels.made
    assert not any(name.startswith("backward") for name in kernels.made)


# a program of 64 threads: what it does, what of that makes it right, and which thread's number each one gets
WAITS = [
    ("own[thread] = thread; {} a.numbers[thread] = own[thread ^ 32];", "__syncthreads();", 32),
    ("own[thread] = thread; {} a.numbers[thread] = own[thread ^ 32];", "barrier_wait(1, 64);", 32),
    ("own[thread] = thread; {} a.numbers[thread] = own[thread ^ 1];", "__syncwarp();", 1),
    ("copy_async(base + 16 * thread, a.numbers + 4 * thread, true); copy_commit(); {} __syncthreads();"
     "a.numbers[thread] = own[thread ^ 32];", "copy_wait();", 32),
]  # fmt: skip
# what it does, and what is said of it
MISTAKES = [
    ("barrier_wait(1, 96);", "threads wait for nobody.* barrier 1 has 64 of 96"),
    ("if (thread < 32) barrier_wait(1, 64); else barrier_wait(1, 96);", "two numbers of threads"),
    ("store_shared(base + 1024, 0);", "no 4 bytes of shared memory at 1024"),
    ("own[1024 / 4 + thread] = 0;", "written behind its end"),
    ("u32 r[4]; load_fragment(r, base + 8);", "no 16 bytes of shared memory at 8"),
    ("copy_async(base, a.numbers + 1, true);", "no multiple of 16"),
    ("if (thread & 1) __syncwarp(); else thread = __shfl_sync(~0u, thread, 0);", "lanes part"),
    ("float d[4][4] = {}; for (int i = 0; i < 9; i++) multiply_narrow<0, 0>(d, 64, 64, true); products_commit();",
     "products it did not wait for"),
]  # fmt: skip
BODIES = [
    *(body.format(wait) for body, needed, _ in WAITS for wait in (needed, "")),
    *(body for body, _ in MISTAKES),
]  # fmt: skip
SOURCE = "struct Numbers { int* numbers; };" + "".join(
    f"""
extern "C" __global__ void kernel_{i}(const __grid_constant__ Numbers a) {{
    extern __shared__ __align__(1024) char shared[];
    int thread = threadIdx.x, *own = (int*)shared;
    u32 base = shared_address(shared);
    {body}
}}"""
    for i, body in enumerate(BODIES)
)


class Numbers(ctypes.Structure):
    """Argument of the programs above."""

    _fields_ = (("numbers", ctypes.c_void_p),)


def emulate(emulator, body: str) -> list[list[int]]:
    """Return the numbers that the threads write, for several schedules."""
    names, which = tuple(f"kernel_{i}" for i in range(len(BODIES))), BODIES.index(body)
    kernel = emulator.kernel("\n" + SOURCE + "\n", names, names[which], {"BFLOAT16": "1", "FLOOR": "0.0f"}, 1024, 64)
    found = []
    for emulator.seed in range(4):
        numbers = torch.arange(256, dtype=torch.int32)
        kernel.launch((1, 1, 1), Numbers(numbers.data_ptr()))
        found.append(numbers[:64].tolist())
    return found


@pytest.mark.parametrize(("body", "wait", "other"), WAITS)
def test_what_a_missing_wait_does(emulator, body, wait, other):
    wanted = [i ^ other for i in range(64)]
    assert all(found == wanted for found in emulate(emulator, body.format(wait)))
    assert any(found != wanted for found in emulate(emulator, body.format("")))


@pytest.mark.parametrize(("body", "problem"), MISTAKES)
def test_what_is_wrong_on_any_gpu_is_told(emulator, body, problem):
    with pytest.raises(RuntimeError, match=problem):
        emulate(emulator, body)
