"""The operators as torch sees them: fake shapes, autograd registration, torch.compile, the meta device."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hgrn2.ops import gated_scan, hgrn2_scan
from hgrn2.ops.call import ScanCall, ScanSettings
from tests.numerics import ORDINARY_RMS, assert_close, run
from tests.ops.scan_cases import free_inputs, tied_inputs
from tests.refusals import refuses

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
CU_SEQLENS = [0, 3, 3, 70, 71]
# torch's own, while inductor is imported
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler(hostile_memory):
    # inductor has no kernel to fill what it allocates; what the operators allocate is theirs to fill
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def operator_call(op, packed: bool, state: bool) -> ScanCall:
    inputs = INPUTS[op](1 if packed else 2, 71, cu_seqlens=CU_SEQLENS if packed else None, state=state)
    if state:
        # dense, in another order
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    if op is hgrn2_scan:
        inputs["lower_bound"] = inputs["lower_bound"].mT.contiguous().mT
        names, settings = ("q", "f", None, "v", "lower_bound"), ("silu", "none", -0.5 if packed else None)
    else:
        names, settings = ("q", "log_f", "k", "v", None), ("none", "none", None)
    tensors = [inputs.get(name) for name in (*names, "initial_state", "cu_seqlens")]
    return ScanCall(*tensors, ScanSettings(packed, 0.5, *settings))


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
def test_opcheck(op, packed, state):
    call = operator_call(op, packed, state)
    # opcheck compares every element of every output, so nothing may be left unwritten
    torch.use_deterministic_algorithms(False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    # 16 chunks in a tile, whose states are kept or not
    for plan in (-16, 16):
        leaves = (
            x.clone().requires_grad_(plan > 0) if x is not None and x.is_floating_point() else x for x in call[:-1]
        )
        arguments = ("chunked", plan, *ScanCall(*leaves, call.settings).flat())
        torch.library.opcheck(torch.ops.hgrn2.scan.default, arguments, test_utils=checks)
    y, final_state, kept = torch.ops.hgrn2.scan("chunked", 16, *call.flat())
    dy = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)
    d_state = torch.randn_like(final_state).mT.contiguous().mT
    for bound_wanted, d_final in ((True, d_state), (False, None)):
        torch.library.opcheck(
            torch.ops.hgrn2.scan_backward.default,
            ("chunked", 16, dy, d_final, kept, bound_wanted, *call.flat()),
            test_utils=("test_schema", "test_faketensor"),
        )


def wrapped(op):
    """A function around op with work before and after that a compiler may fuse and reorder."""

    def function(q, initial_state, **inputs):
        y, state = op(q=2 * q, initial_state=initial_state.sin(), **inputs)
        return y * 0.5 + 1, state.cos()

    return function


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(op, packed):
    inputs = INPUTS[op](1 if packed else 2, 71, cu_seqlens=CU_SEQLENS if packed else None)
    compiled = torch.compile(wrapped(op), fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, inputs), run(wrapped(op), inputs), 1e-7)


@pytest.mark.slow
@both_operators
def test_one_graph_serves_every_length(op):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped(op), fullgraph=True, dynamic=True, backend=counter)
    for length in (200, 37, 64, 65, 1000, 5, 300, 129, 2, 500):
        inputs = INPUTS[op](2, length, 1, 4, 4)
        assert_close(run(compiled, inputs), run(wrapped(op), inputs), 1e-7)
    assert counter.frame_count <= 2


@pytest.mark.slow
@both_operators
def test_one_graph_serves_every_packing(op):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped(op), fullgraph=True, dynamic=True, backend=counter)
    for cu_seqlens in ([0, 70, 100], [0, 1, 1, 5, 37], [0, 10, 20, 30, 40, 50, 60, 300], [0, 64, 128], [0, 3, 500]):
        inputs = INPUTS[op](1, cu_seqlens[-1], 1, 4, 4, cu_seqlens=cu_seqlens)
        assert_close(run(compiled, inputs), run(wrapped(op), inputs), 1e-7)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compiled_equals_eager():
    inputs = tied_inputs(2, 100)
    # strides that are not the default ones
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    inputs["lower_bound"] = inputs["lower_bound"].mT.contiguous().mT
    compiled = torch.compile(wrapped(hgrn2_scan), fullgraph=True)
    assert_close(run(compiled, inputs), run(wrapped(hgrn2_scan), inputs), ORDINARY_RMS)


@pytest.mark.slow
def test_compiled_inference_and_bf16():
    inputs = tied_inputs(2, 100, dtype=torch.bfloat16)
    compiled = torch.compile(wrapped(hgrn2_scan), fullgraph=True)
    with torch.no_grad():
        found = run(compiled, inputs, gradients=False)
    wanted = run(wrapped(hgrn2_scan), inputs, gradients=False)
    assert found["y"].dtype == torch.bfloat16
    # a compiler may keep digits between element-wise operations that eager rounds away
    assert_close(found, wanted, 4e-3)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("bad", [[0, 5], [0, 6, 4, 10], [0, 11], [-1, 10], [1, 10]])
def test_bad_cu_seqlens_are_refused_when_compiled(op, bad):
    inputs = INPUTS[op](1, 10, state=False)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with refuses("invalid-value", "cu_seqlens"):
        compiled(**inputs | {"cu_seqlens": torch.tensor(bad)})


def test_a_refusal_in_a_trace_keeps_its_message():
    inputs = tied_inputs(1, 10)
    compiled = torch.compile(hgrn2_scan, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"UserError.*q_activation is 'relu'"):
        compiled(**inputs, q_activation="relu")


@both_operators
def test_meta_device_gives_shapes(op):
    inputs = {name: None if x is None else x.to("meta") for name, x in INPUTS[op](1, 71, cu_seqlens=CU_SEQLENS).items()}
    y, state = op(**inputs)
    assert (y.shape, y.dtype, y.device.type) == ((1, 71, 2, 5), torch.float32, "meta")
    assert (state.shape, state.dtype, state.device.type) == ((4, 2, 6, 5), torch.float32, "meta")
