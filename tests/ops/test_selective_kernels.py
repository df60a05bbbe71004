"""The kernels of Mamba's recurrence in Triton's interpreter; `test_recurrences_gpu.py` compiles them."""

from functools import partial

import pytest
import torch

from hgrn2.ops import selective_scan
from tests.numerics import EXTREME_RMS, ORDINARY_RMS, assert_close, assert_equal, run
from tests.ops import test_triton
from tests.ops.test_selective_scan import at_once, inputs
from tests.refusals import refuses

pytestmark = test_triton.pytestmark

RAGGED = [0, 0, 3, 3, 4, 20, 36, 53, 53]
both_ways = pytest.mark.parametrize("reverse", [False, True])


def check(given, rms=ORDINARY_RMS, **settings):
    """Outputs, final state and all gradients against all states at once in float64."""
    exact = run(at_once, given, dtype=torch.float64, **settings)
    found = run(selective_scan, given, backend="triton", **settings)
    assert_close(found, exact, rms)
    return found


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 63, 64, 65])
def test_every_length(length, reverse):
    check(inputs(1, length, 3, 3), reverse=reverse)


@pytest.mark.slow
def test_a_longer_sequence():
    check(inputs(1, 200, 2, 2, state=False))


@pytest.mark.parametrize("size", [(2, 5, 1, 1), (1, 5, 35, 2), (1, 5, 2, 17), (0, 5, 2, 2), (1, 5, 0, 2)], ids=str)
def test_every_width(size):
    check(inputs(*size))


@both_ways
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0], [0, 16, 32]], ids=str)
def test_packed_sequences(bounds, state, reverse):
    check(inputs(1, bounds[-1], 2, 2, cu_seqlens=bounds, state=state), reverse=reverse)


@pytest.mark.parametrize("step", [-12.0, -4.0, 4.0, 30.0])
def test_steps_of_every_size(step):
    check(inputs(1, 70, 2, 3, step=step), EXTREME_RMS)


def test_without_a_step_the_state_stays():
    given = inputs(1, 20, 2, 2)
    given["dt"] = torch.zeros_like(given["dt"])
    _, state = selective_scan(**given, backend="triton")
    assert torch.equal(state, given["initial_state"])


def test_bfloat16_inputs_are_rounded_once():
    given = inputs(1, 40, 3, 3, dtype=torch.bfloat16)
    found = run(selective_scan, given, backend="triton")
    wanted = run(at_once, given, dtype=torch.float64)
    high, low = ({n: x for n, x in found.items() if (x.dtype == torch.float32) == wide} for wide in (True, False))
    assert set(low) == {"d_u", "d_b", "d_c"}
    assert_close(high, {name: wanted[name] for name in high}, ORDINARY_RMS)
    # the interpreter cuts digits off where a GPU rounds
    assert_close(low, {name: wanted[name] for name in low}, 5e-3)


def test_strided_inputs_and_equal_bits():
    given = inputs(2, 20, 3, 3)
    strided = dict(given)
    for name in ("u", "dt", "b", "c"):
        strided[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    strided["b"], strided["c"] = torch.cat([given["b"], given["c"]], -1).chunk(2, -1)
    assert_equal(check(strided), check(given))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_registered_as_torch_wants_it(bounds):
    given = list(inputs(1, 53, 2, 2, cu_seqlens=bounds).values())
    leaves = [x.requires_grad_() for x in given[:-1]]
    call = (*leaves, given[-1], False, True)
    torch.library.opcheck(torch.ops.hgrn2.selective_scan_kernels.default, call)


@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(bounds):
    given = inputs(1, 53, 2, 2, cu_seqlens=bounds)
    op = partial(selective_scan, backend="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, given), run(op, given), 1e-7)


def test_vmap_equals_a_loop():
    given = inputs(1, 17, 2, 2)
    names = ("u", "dt", "a", "b", "c")
    pairs = [torch.stack([given[name], given[name] * 0.5]) for name in names]
    op = partial(selective_scan, backend="triton")
    found = torch.vmap(op)(*pairs)
    wanted = [torch.stack(parts) for parts in zip(*(op(*(x[i] for x in pairs)) for i in range(2)), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_nothing_is_kept_without_gradients():
    given = inputs(1, 40, 2, 2)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in given.items()}
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**leaves, backend="triton")
    # u, dt, b, c, a, and five states before blocks
    assert sum(kept) == 40 * (2 * 2 + 2 * 2) + 4 + 5 * 4
    with torch.no_grad():
        wanted = selective_scan(**given, backend="triton")
    assert torch.equal(selective_scan(**given, backend="triton")[0], wanted[0])


@both_ways
@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_plain_torch_runs_backwards_too(bounds, reverse):
    given = inputs(1, 53, 3, 2, cu_seqlens=bounds)
    exact = run(at_once, given, dtype=torch.float64, reverse=reverse)
    assert_close(run(selective_scan, given, backend="tiles", reverse=reverse), exact, ORDINARY_RMS)


def test_mistakes_are_named():
    given = inputs(1, 4, 2, 2)
    with refuses("unknown-name", "tritn", "triton"):
        selective_scan(**given, backend="tritn")
    with refuses("unsupported", "triton", "float64"):
        selective_scan(**{k: None if x is None else x.double() for k, x in given.items()}, backend="triton")
