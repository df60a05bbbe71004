"""Mamba's recurrence, tile by tile, against the recurrence of all tokens at once in float64."""

import pytest
import torch

from hgrn2.ops import linear_scan, selective_scan
from tests.numerics import EXTREME_RMS, FLOAT64_RMS, ORDINARY_RMS, assert_close, run
from tests.refusals import refuses

RAGGED = [0, 3, 3, 4, 300, 300, 301, 530, 530]


def inputs(batch=2, length=40, width=5, state_size=3, *, dtype=torch.float32, cu_seqlens=None, state=True, step=0.0):
    generator = torch.Generator().manual_seed(length)
    num = batch if cu_seqlens is None else len(cu_seqlens) - 1

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    return {
        "u": normal(batch, length, width).to(dtype),
        "dt": torch.nn.functional.softplus(normal(batch, length, width) + step).to(wide),
        "a": -normal(width, state_size).exp().to(wide),
        "b": normal(batch, length, state_size).to(dtype),
        "c": normal(batch, length, state_size).to(dtype),
        "initial_state": normal(num, width, state_size).to(wide) if state else None,
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    }


def at_once(u, dt, a, b, c, initial_state, cu_seqlens, reverse=False):
    decay, write = torch.exp(dt.unsqueeze(-1) * a), (dt * u).unsqueeze(-1) * b.unsqueeze(-2)
    h, state = linear_scan(
        decay, write, initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse, backend="reference"
    )
    return (h * c.unsqueeze(-2)).sum(-1), state


def check(given, rms, dtype=None):
    assert_close(run(selective_scan, given, dtype=dtype), run(at_once, given, dtype=torch.float64), rms)


@pytest.mark.parametrize("length", [0, 1, 2, 40, 255, 256, 257, 600])
def test_every_length(length):
    check(inputs(length=length), ORDINARY_RMS)
    check(inputs(length=length), FLOAT64_RMS, torch.float64)
    check(inputs(length=length, state=False), ORDINARY_RMS)


def test_wide_rows_have_short_tiles():
    check(inputs(1, 50, 1100, 16), ORDINARY_RMS)


@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0], [0, 0, 3, 3], [0, 256, 512], [0, 530]], ids=str)
@pytest.mark.parametrize("state", [True, False])
def test_packed_sequences(bounds, state):
    given = inputs(1, bounds[-1], cu_seqlens=bounds, state=state)
    check(given, ORDINARY_RMS)
    check(given, FLOAT64_RMS, torch.float64)


@pytest.mark.parametrize("step", [-12.0, -4.0, 4.0, 30.0])
def test_steps_of_every_size(step):
    """From decays of 1 - 1e-5 to decays that float32 cannot hold."""
    check(inputs(length=600, step=step), EXTREME_RMS)


def test_without_a_step_the_state_stays():
    given = inputs(length=20)
    given["dt"] = torch.zeros_like(given["dt"])
    _, state = selective_scan(**given)
    assert torch.equal(state, given["initial_state"])


def test_bfloat16_inputs_are_rounded_once():
    given = inputs(2, 300, dtype=torch.bfloat16)
    found = run(selective_scan, given)
    wanted = run(at_once, given, dtype=torch.float64)
    assert found["y"].dtype == torch.float32
    high, low = ({n: x for n, x in found.items() if (x.dtype == torch.float32) == wide} for wide in (True, False))
    assert set(low) == {"d_u", "d_b", "d_c"}
    assert_close(high, {name: wanted[name] for name in high}, ORDINARY_RMS)
    assert_close(low, {name: wanted[name] for name in low}, 3e-3)


def test_states_of_all_tokens_are_not_kept():
    given, kept = inputs(1, 512, 64, 16), []
    leaves = {name: None if x is None else x.requires_grad_() for name, x in given.items()}

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**leaves)
    # u, dt, b, c, a, the first state, and room for the states before the tiles and two more
    assert sum(kept) == 512 * (2 * 64 + 2 * 16) + (2 + 512 // 256 + 2) * 64 * 16


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 20]], ids=["batch", "packed"])
def test_registered_as_torch_wants_it(bounds):
    given = list(inputs(1, 20, cu_seqlens=bounds).values())
    leaves = [x.requires_grad_() for x in given[:-1]]
    torch.library.opcheck(torch.ops.hgrn2.selective_scan.default, (*leaves, given[-1]))


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 20]], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(bounds):
    given = inputs(1, 20, cu_seqlens=bounds)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, given), run(selective_scan, given), 1e-7)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"u": torch.ones(2, 3)}, ["u"]),
        ({"dt": torch.ones(1, 40, 5)}, ["dt", [1, 40, 5]]),
        ({"a": torch.ones(3, 5)}, ["a", [3, 5], "E=5"]),
        ({"b": torch.ones(2, 40, 5)}, ["b", "S=3"]),
        ({"c": torch.ones(2, 41, 3)}, ["c", "T=40"]),
        ({"initial_state": torch.ones(1, 5, 3)}, ["initial_state", "N=2"]),
    ],
    ids=str,
)
def test_mistakes_are_named(changes, names):
    with refuses("invalid-value", *names):
        selective_scan(**inputs() | changes)


def test_one_program_serves_every_length():
    class Scan(torch.nn.Module):
        def forward(self, u, dt, a, b, c):
            return selective_scan(u, dt, a, b, c)

    length = torch.export.Dim("T", min=2, max=4096)
    axes = tuple({} if name == "a" else {1: length} for name in ("u", "dt", "a", "b", "c"))
    given = [list(inputs(length=length).values())[:5] for length in (9, 300)]
    program = torch.export.export(Scan(), tuple(given[0]), dynamic_shapes=axes).module()
    assert torch.equal(program(*given[1])[0], selective_scan(*given[1])[0])
