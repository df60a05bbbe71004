"""A backend of somebody else, registered from outside the package: `double_backend.py`."""

from __future__ import annotations

import pytest
import torch

from hgrn2.nn import HGRN2Mixer
from hgrn2.ops import check_backend, gated_scan, hgrn2_scan, hgrn2_step, resolve_backend
from hgrn2.ops.backends import auto_order, backend_names, registered
from tests.numerics import assert_close, run
from tests.ops.double_backend import DoubleBackend
from tests.ops.scan_cases import free_inputs, tied_inputs
from tests.refusals import refuses

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
CU_SEQLENS = [0, 3, 3, 70, 71]


@pytest.fixture
def double():
    backend = DoubleBackend()
    with registered(backend):
        yield backend


def test_it_is_listed_while_it_is_registered(double):
    assert backend_names()[-1] == "double"
    check_backend("double")
    with refuses("unknown-name", "'doubel'", "'double'"):
        check_backend("doubel")
    with refuses("unsupported", "'double'", "torch.float64"):
        hgrn2_scan(**tied_inputs(1, 3, dtype=torch.float64), backend="double")


def test_it_is_unknown_elsewhere():
    with refuses("unknown-name", "'double'", "'chunked'"):
        hgrn2_scan(**tied_inputs(1, 3), backend="double")


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_outputs_and_gradients(double, op, packed):
    inputs = INPUTS[op](1 if packed else 2, 71, cu_seqlens=CU_SEQLENS if packed else None)
    exact = run(op, inputs, dtype=torch.float64, backend="reference", reverse=True)
    # float64 rounded once
    assert_close(run(op, inputs, backend="double", reverse=True), exact, 1e-7)
    assert double.calls == {"forward": 1, "backward": 1, "step": 0}


@both_operators
def test_it_compiles_whole(double, op):
    inputs = INPUTS[op](2, 71)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs, backend="double")
    torch.compiler.reset()
    assert_close(found, run(op, inputs, backend="double"), 1e-7)
    assert double.calls == {"forward": 2, "backward": 2, "step": 0}


def test_auto_may_choose_it(double):
    with registered(auto_order=("double", *auto_order())):
        assert resolve_backend("auto", torch.device("cpu"), torch.float32, 4, 4) == "double"
        assert resolve_backend("auto", torch.device("cpu"), torch.float64, 4, 4) == "chunked"
        hgrn2_scan(**tied_inputs(1, 3))
    hgrn2_scan(**tied_inputs(1, 3))
    assert double.calls["forward"] == 1


def test_a_layer_learns_and_decodes_with_it(double):
    torch.manual_seed(0)
    layer = HGRN2Mixer(16, expand_ratio=8, backend="double")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, wanted = torch.randn(2, 2, 20, 16).unbind(0)
    losses = []
    for _ in range(5):
        y, _ = layer(x)
        loss = (y - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert double.calls == {"forward": 5, "backward": 5, "step": 0}
    with torch.no_grad():
        whole, _ = layer(x)
        _, state = layer(x[:, :19])
        last, _ = layer(x[:, 19:], state=state)
    torch.testing.assert_close(last, whole[:, 19:])
    assert double.calls["step"] == 1


def test_a_step(double):
    inputs = tied_inputs(2, 1)
    q, f, v = (inputs[name][:, 0] for name in "qfv")
    y, state = hgrn2_step(q, f, v, inputs["initial_state"], inputs["lower_bound"], backend="double")
    wanted_y, wanted_state = hgrn2_scan(**inputs, backend="double")
    torch.testing.assert_close(y, wanted_y[:, 0])
    torch.testing.assert_close(state, wanted_state)
