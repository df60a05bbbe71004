"""Every way of computing the same thing agrees: whole, split, stepwise, packed, reversed, resumed, any strides."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from tests.numerics import FLOAT64_RMS, ORDINARY_RMS, assert_close, assert_equal, run
from tests.ops.scan_cases import free_inputs, tied_inputs

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
both_dtypes = pytest.mark.parametrize(
    ("dtype", "rms"), [(torch.float32, ORDINARY_RMS), (torch.float64, FLOAT64_RMS)], ids=["float32", "float64"]
)
# empty ones at both ends and in a row, single tokens, whole chunks, more than a chunk
CU_SEQLENS = [0, 0, 1, 2, 2, 2, 66, 67, 131, 200, 328, 328]
BY_TOKEN = ("q", "f", "k", "v", "log_f")


def split(inputs, start, stop):
    return {name: x[:, start:stop] if name in BY_TOKEN else x for name, x in inputs.items()}


@both_operators
@both_dtypes
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("point", [0, 1, 15, 64, 65, 127, 149, 150])
def test_split_anywhere(op, dtype, rms, reverse, point):
    inputs = INPUTS[op](2, 150, dtype=dtype)

    def in_two(initial_state, **inputs):
        parts = [split(inputs, 0, point), split(inputs, point, 150)]
        outputs, state = [], initial_state
        for part in reversed(parts) if reverse else parts:
            y, state = op(**part, initial_state=state, reverse=reverse)
            outputs.append(y)
        return torch.cat(outputs[::-1] if reverse else outputs, 1), state

    # gradients flow through the carried state
    assert_close(run(in_two, inputs), run(op, inputs, reverse=reverse), rms)


@both_operators
def test_resumed_token_by_token_and_in_odd_pieces(op):
    inputs = INPUTS[op](2, 150)
    whole = run(op, inputs, gradients=False)
    state, outputs, at = inputs["initial_state"], [], 0
    for size in (1, 1, 7, 64, 0, 3, 70, 4):
        y, state = op(**(split(inputs, at, at + size) | {"initial_state": state}))
        outputs.append(y)
        at += size
    assert at == 150
    assert_close({"y": torch.cat(outputs, 1), "final_state": state}, whole, ORDINARY_RMS)


@both_operators
@both_dtypes
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(op, dtype, rms, reverse):
    inputs = INPUTS[op](1, 328, dtype=dtype, cu_seqlens=CU_SEQLENS)

    def one_by_one(initial_state, cu_seqlens, **inputs):
        outputs, states = [], []
        for n, (start, stop) in enumerate(pairwise(CU_SEQLENS)):
            part = split(inputs, start, stop)
            y, state = op(**part, initial_state=initial_state[n : n + 1], reverse=reverse)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    found, wanted = run(op, inputs, reverse=reverse), run(one_by_one, inputs)
    assert_close(found, wanted, rms)
    assert_close(found, run(op, inputs, reverse=reverse, backend="reference"), rms)


@both_operators
def test_packed_without_initial_state_and_with_int64(op):
    inputs = INPUTS[op](1, 328, cu_seqlens=CU_SEQLENS)
    zeros = inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    wanted = run(op, zeros)
    del wanted["d_initial_state"]
    none = inputs | {"initial_state": None, "cu_seqlens": inputs["cu_seqlens"].long()}
    assert_equal(run(op, none), wanted)


@both_operators
def test_one_packed_sequence_is_a_batch_of_one(op):
    inputs = INPUTS[op](1, 200)
    assert_close(run(op, inputs | {"cu_seqlens": torch.tensor([0, 200])}), run(op, inputs), 1e-7)


@both_operators
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_packed_sequence(op, backend):
    found = run(op, INPUTS[op](1, 0, cu_seqlens=[0]), backend=backend)
    assert found["y"].shape == (1, 0, 2, 5)
    assert found["final_state"].shape == (0, 2, 6, 5)


@both_operators
def test_nan_stays_in_its_sequence(op):
    inputs = INPUTS[op](1, 328, cu_seqlens=CU_SEQLENS)
    inputs["v"][:, 66] = float("nan")
    y, state = op(**inputs)
    assert y[:, 66].isnan().all()
    assert y[:, :66].isfinite().all()
    assert y[:, 67:].isfinite().all()
    assert state[7 - 1].isnan().all()
    assert state[torch.arange(11) != 6].isfinite().all()


@both_operators
@both_dtypes
def test_reverse_is_flipped(op, dtype, rms):
    inputs = INPUTS[op](2, 150, dtype=dtype)

    def flipped(**inputs):
        y, state = op(**{name: x.flip(1) if name in BY_TOKEN else x for name, x in inputs.items()})
        return y.flip(1), state

    assert_close(run(op, inputs, reverse=True), run(flipped, inputs), rms)


@both_dtypes
@pytest.mark.parametrize("bound", [None, 0.9])
@pytest.mark.parametrize("shift", [0.0, 12.0, 25.0, -25.0])
def test_stepwise_is_chunked(dtype, rms, bound, shift):
    inputs = tied_inputs(2, 70, dtype=dtype, bound=bound)
    inputs["f"] = inputs["f"] + shift
    settings = {"scale": 0.7, "q_activation": "sigmoid", "v_activation": "silu"}

    def stepwise(q, f, v, lower_bound, initial_state, cu_seqlens):
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            y, state = hgrn2_step(q[:, t], f[:, t], v[:, t], state, lower_bound, **settings)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    assert_close(run(stepwise, inputs), run(hgrn2_scan, inputs, **settings), rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_step_keeps_dtypes_and_inputs(dtype):
    inputs = tied_inputs(3, 1, dtype=dtype)
    q, f, v = (inputs[name][:, 0] for name in ("q", "f", "v"))
    state = inputs["initial_state"]
    before = state.clone()
    y, after = hgrn2_step(q, f, v, state, inputs["lower_bound"])
    assert (y.dtype, after.dtype) == (dtype, torch.float32)
    assert torch.equal(state, before)
    with torch.autocast("cpu", torch.bfloat16):
        y_cast, after_cast = hgrn2_step(q, f, v, state, inputs["lower_bound"])
    assert_equal({"y": y_cast, "state": after_cast}, {"y": y, "state": after})


def test_slices_of_one_projection():
    batch, length, heads, width = 2, 150, 2, 8
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(batch, length, 3 * heads * width, generator=generator)
    parts = [x.unflatten(-1, (heads, width)) for x in projection.chunk(3, -1)]
    assert not any(x.is_contiguous() for x in parts)
    names = ("q", "f", "v")
    sliced = run(hgrn2_scan, dict(zip(names, parts, strict=True)))
    assert_equal(sliced, run(hgrn2_scan, {name: x.contiguous() for name, x in zip(names, parts, strict=True)}))


@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_any_strides(op, reverse):
    inputs = INPUTS[op](2, 150)
    wanted = run(op, inputs, reverse=reverse)
    strided = {}
    for i, (name, x) in enumerate(inputs.items()):
        if x is not None:
            # the last axis outermost, then every second element of a wider one, then time before batch
            turned = (
                x.movedim(-1, 0).contiguous().movedim(0, -1),
                torch.stack((x, x), -1).flatten(-2)[..., ::2],
                x.transpose(0, 1).contiguous().transpose(0, 1),
            )[i % 3]
            assert torch.equal(turned, x)
            strided[name] = turned
        else:
            strided[name] = None
    assert any(not x.is_contiguous() for x in strided.values() if x is not None)
    assert_equal(run(op, strided, reverse=reverse), wanted)


@both_operators
def test_one_tensor_for_many_heads(op):
    # stride 0 along heads and batch
    inputs = INPUTS[op](2, 70)
    inputs["q"] = inputs["q"][:1, :, :1].expand(inputs["q"].shape)
    assert_equal(run(op, inputs), run(op, inputs | {"q": inputs["q"].contiguous()}))


@both_operators
def test_gradients_of_expanded_and_missing_outputs(op):
    inputs = INPUTS[op](2, 70)
    for use in (lambda y, state: y.sum(), lambda y, state: state.sum()):
        grads = []
        for backend in ("chunked", "reference"):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
            loss = use(*op(**leaves, backend=backend))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            grads.append(dict(zip(leaves, found, strict=True)))
        assert_close(grads[0], grads[1], ORDINARY_RMS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = tied_inputs(2, 100)
    gradients = []
    for use in (lambda f, q: f(q), lambda f, q: checkpoint(f, q, use_reentrant=reentrant)):
        q = inputs["q"].clone().requires_grad_()
        use(lambda q: hgrn2_scan(**(inputs | {"q": q})), q)[0].sum().backward()
        gradients.append(q.grad)
    assert torch.equal(*gradients)


def test_inference_mode():
    inputs = tied_inputs(2, 100)
    wanted = hgrn2_scan(**inputs)[0]
    with torch.inference_mode():
        assert torch.equal(hgrn2_scan(**inputs)[0], wanted)
