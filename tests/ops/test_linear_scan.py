"""The element-wise recurrence against its definition in float64: both forms, real and complex numbers."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hgrn2.ops import linear_scan
from tests.numerics import EXTREME_RMS, FLOAT64_RMS, ORDINARY_RMS, assert_close, assert_no_worse, run
from tests.ops.scan_cases import log_uniform, spread
from tests.refusals import refuses

LENGTHS = (0, 1, 2, 3, 7, 64, 65, 200)
OUTPUTS = ("h", "final_state")
RAGGED = [0, 5, 5, 6, 17, 17, 20, 20]
FORMS = ["steps", "halving"]

forms = pytest.mark.parametrize("backend", FORMS)
numbers = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])


def inputs(
    batch=2, length=50, rest=(6,), *, log_a=None, is_complex=False, dtype=torch.float32, cu_seqlens=None, state=True
):
    """Inputs by name; complex ones as pairs of real numbers, [..., 2]."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, length, *rest)
    num = batch if cu_seqlens is None else len(cu_seqlens) - 1
    pair = (2,) if is_complex else ()

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a = torch.nn.functional.logsigmoid(2 * normal(*shape) + 2).exp() if log_a is None else log_a.double().exp()
    if is_complex:
        a = torch.view_as_real(torch.polar(a, 3 * normal(*shape)))
    return {
        "a": a.to(torch.promote_types(dtype, torch.float32)),
        "b": normal(*shape, *pair).to(dtype),
        "initial_state": normal(num, *rest, *pair).to(torch.promote_types(dtype, torch.float32)) if state else None,
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    }


def ours(a, b, initial_state, cu_seqlens, is_complex=False, **settings):
    """The operator on inputs of `inputs`, its results as pairs again."""
    settings["cu_seqlens"] = cu_seqlens
    if not is_complex:
        return linear_scan(a, b, initial_state=initial_state, **settings)
    state = None if initial_state is None else torch.view_as_complex(initial_state)
    h, state = linear_scan(*map(torch.view_as_complex, (a, b)), initial_state=state, **settings)
    return torch.view_as_real(h), torch.view_as_real(state)


def exact(given, **settings):
    return run(ours, given, outputs=OUTPUTS, dtype=torch.float64, backend="reference", **settings)


def check(given, rms, dtype=None, backend="auto", **settings):
    found = run(ours, given, outputs=OUTPUTS, dtype=dtype, backend=backend, **settings)
    assert_close(found, exact(given, **settings), rms)


def test_the_definition_by_hand():
    a, b = torch.tensor([0.5, 2.0, -1.0]).view(1, 3, 1), torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1)
    for backend in ("reference", *FORMS):
        h, state = linear_scan(a, b, initial_state=torch.tensor([[4.0]]), backend=backend)
        assert h.flatten().tolist() == [3.0, 9.0, -4.0]
        assert state.tolist() == [[-4.0]]
        h, state = linear_scan(a, b, initial_state=torch.tensor([[4.0]]), reverse=True, backend=backend)
        assert h.flatten().tolist() == [3.5, 5.0, 1.0]
        assert state.tolist() == [[3.5]]
        # a quarter turn
        h, _ = linear_scan(torch.full((1, 3, 1), 1j), b, backend=backend)
        assert h.flatten().tolist() == [1, 3 + 1j, 4 + 3j]


@forms
@numbers
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(backend, is_complex, reverse, length):
    given = inputs(length=length, is_complex=is_complex)
    check(given, ORDINARY_RMS, backend=backend, is_complex=is_complex, reverse=reverse)
    check(given, FLOAT64_RMS, torch.float64, backend=backend, is_complex=is_complex, reverse=reverse)


@forms
@numbers
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0], [0, 0, 3, 3], [0, 41]], ids=str)
def test_packed_sequences(backend, is_complex, reverse, bounds):
    given = inputs(1, bounds[-1], (3, 2), is_complex=is_complex, cu_seqlens=bounds)
    check(given, ORDINARY_RMS, backend=backend, is_complex=is_complex, reverse=reverse)
    given["initial_state"] = None
    check(given, ORDINARY_RMS, backend=backend, is_complex=is_complex, reverse=reverse)


@forms
@numbers
@pytest.mark.parametrize("log_a", [-1e-4, -1e-2, -1.0, -20.0, 0.0, float("-inf")])
@pytest.mark.parametrize("length", [65, 1000])
def test_decays_of_one_size(backend, is_complex, log_a, length):
    given = inputs(1, length, (5,), log_a=torch.full((1, length, 5), log_a), is_complex=is_complex)
    check(given, EXTREME_RMS, backend=backend, is_complex=is_complex)


@forms
@numbers
def test_decays_of_every_size_side_by_side(backend, is_complex):
    shape = (2, 300, 7)
    wild = (-1e-6, -1e-4, -0.5, -20.0, -200.0, float("-inf"), 0.0)
    for log_a in (-log_uniform(shape, 1e-6, 50), spread(shape, wild), spread(shape, (-1e-6,) * 50 + (-50.0,))):
        given = inputs(2, 300, (7,), log_a=log_a, is_complex=is_complex)
        check(given, EXTREME_RMS, backend=backend, is_complex=is_complex)
        packed = inputs(1, 300, (7,), log_a=log_a[:1], is_complex=is_complex, cu_seqlens=[0, 100, 100, 101, 300])
        check(packed, EXTREME_RMS, backend=backend, is_complex=is_complex)


@forms
@pytest.mark.parametrize("reverse", [False, True])
def test_bfloat16_rounds_only_what_goes_in_and_out(backend, reverse):
    given = inputs(2, 200, (8,), dtype=torch.bfloat16)

    def honest(a, b, initial_state, cu_seqlens, reverse):
        # the state in float32, as a careful person keeps it
        steps, state, outputs = range(a.shape[1]), initial_state, []
        for t in reversed(steps) if reverse else steps:
            state = a[:, t] * state + b[:, t]
            outputs.append(state.bfloat16())
        return torch.stack(outputs[::-1] if reverse else outputs, 1), state

    found = run(ours, given, outputs=("y", "final_state"), backend=backend, reverse=reverse)
    assert (found["y"].dtype, found["final_state"].dtype) == (torch.bfloat16, torch.float32)
    assert (found["d_a"].dtype, found["d_b"].dtype) == (torch.float32, torch.bfloat16)
    wanted = run(ours, given, outputs=("y", "final_state"), dtype=torch.float64, backend="reference", reverse=reverse)
    assert_no_worse(found, run(honest, given, outputs=("y", "final_state"), reverse=reverse), wanted)


def test_dtypes_of_results():
    a, b = torch.rand(1, 3, 2), torch.rand(1, 3, 2)
    for one, two, wanted in (
        (a, b.double(), torch.float64), (a, b.to(torch.complex64), torch.complex64), (a.bfloat16(), b, torch.float32),
        (a.double(), b.to(torch.complex64), torch.complex128),
    ):  # fmt: skip
        h, state = linear_scan(one, two)
        assert (h.dtype, state.dtype) == (wanted, wanted)
    h, state = linear_scan(a.to(torch.complex64), b.half())
    assert (h.dtype, state.dtype) == (torch.complex64, torch.complex64)


def test_forms_are_chosen_by_the_width_of_a_row():
    narrow, wide = inputs(2, 65, (6,)), inputs(2, 65, (1024,))
    for given, form in ((narrow, "halving"), (wide, "steps")):
        found, wanted = (run(ours, given, outputs=OUTPUTS, backend=name) for name in ("auto", form))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_any_strides():
    given = inputs(2, 33, (4, 3))
    strided = {name: x if x is None else x.mT.contiguous().mT for name, x in given.items()}
    strided["a"] = strided["a"].transpose(0, 1).contiguous().transpose(0, 1)
    for backend in FORMS:
        check(strided, ORDINARY_RMS, backend=backend)


def test_parts_go_on_from_a_state():
    given = inputs(2, 40)
    a, b, state = given["a"], given["b"], given["initial_state"]
    wanted, last = linear_scan(a, b, initial_state=state)
    found = []
    for part in (slice(0, 1), slice(1, 1), slice(1, 8), slice(8, 40)):
        h, state = linear_scan(a[:, part], b[:, part], initial_state=state)
        found.append(h)
    torch.testing.assert_close(torch.cat(found, 1), wanted)
    torch.testing.assert_close(state, last)
    # the state is a value of its own, not a view of h
    assert last.untyped_storage().nbytes() == last.numel() * 4


@numbers
def test_what_is_kept_grows_with_the_tokens_alone(is_complex):
    given = inputs(1, 512, (3,), is_complex=is_complex)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    leaves = {name: None if x is None else x.requires_grad_() for name, x in given.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ours(**leaves, is_complex=is_complex, backend="halving")
    assert sum(kept) == 2 * 512 * 3 + 3


@numbers
def test_registered_as_torch_wants_it(is_complex):
    given = inputs(2, 9, is_complex=is_complex)
    a, b, state = (torch.view_as_complex(x) if is_complex else x for x in list(given.values())[:3])
    for reverse in (False, True):
        leaves = [x.requires_grad_() for x in (a, b, state)]
        torch.library.opcheck(torch.ops.hgrn2.linear_scan.default, (*leaves, reverse, "auto"))


def wrapped(a, b, initial_state, cu_seqlens, **settings):
    h, state = ours(a * 0.9, b.sin(), initial_state, cu_seqlens, **settings)
    return h * 0.5 + 1, state.cos()


@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
@numbers
def test_traced_whole_graph_equals_eager(bounds, is_complex):
    given = inputs(2 if bounds is None else 1, 20, is_complex=is_complex, cu_seqlens=bounds)
    op = partial(wrapped, is_complex=is_complex)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, given, outputs=OUTPUTS), run(op, given, outputs=OUTPUTS), 1e-7)


@pytest.mark.slow
def test_one_graph_serves_every_length():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped, fullgraph=True, dynamic=True, backend=counter)
    for length in (200, 37, 64, 65, 1000, 5, 2):
        given = inputs(2, length)
        assert_close(run(compiled, given, outputs=OUTPUTS), run(wrapped, given, outputs=OUTPUTS), 1e-7)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compiled_equals_eager():
    given = inputs(2, 100)
    compiled = torch.compile(wrapped, fullgraph=True)
    assert_close(run(compiled, given, outputs=OUTPUTS), run(wrapped, given, outputs=OUTPUTS), ORDINARY_RMS)


def test_meta_device_gives_shapes():
    h, state = linear_scan(*torch.empty(2, 1, 20, 3, 4, device="meta"), cu_seqlens=torch.tensor(RAGGED).to("meta"))
    assert (h.shape, state.shape) == ((1, 20, 3, 4), (7, 3, 4))


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"a": torch.ones(1, 3)}, "invalid-value", ["a is", [1, 3]]),
        ({"b": torch.ones(1, 3, 2).long()}, "invalid-value", ["b is", "torch.int64"]),
        ({"b": torch.ones(1, 4, 2)}, "mismatch", [[1, 3, 2], [1, 4, 2]]),
        ({"b": 3}, "invalid-value", ["b is 3"]),
        ({"initial_state": torch.ones(2, 2)}, "invalid-value", ["initial_state", [2, 2], "N=1"]),
        ({"initial_state": torch.ones(1, 2).to(torch.complex64)}, "mismatch", ["complex64", "float32"]),
        ({"cu_seqlens": torch.tensor([0, 2])}, "invalid-value", ["cu_seqlens"]),
        ({"backend": "stepz"}, "unknown-name", ["stepz", "steps"]),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(changes, code, names):
    with refuses(code, *names):
        linear_scan(**{"a": torch.ones(1, 3, 2), "b": torch.ones(1, 3, 2)} | changes)
