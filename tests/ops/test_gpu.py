"""The operator on a GPU, against the float64 recurrence on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hgrn2 import HGRN2LM, presets
from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from tests.numerics import EXTREME_RMS, ORDINARY_RMS, relative_error, run
from tests.ops.scan_cases import free_inputs, tied_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [
    {"length": 1},
    {"length": 63},
    {"length": 200, "k_width": 32, "v_width": 48},
    {"batch": 1, "length": 300, "cu_seqlens": [0, 0, 70, 71, 300], "k_width": 16, "v_width": 16},
    {"batch": 3, "length": 1030, "heads": 4, "k_width": 64, "v_width": 64},
]
# rounding to the dtype, a few times over, relative to the size of the result
LOW_PRECISION_RMS = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if torch.is_tensor(x) else x for name, x in inputs.items()}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "make"), [(hgrn2_scan, tied_inputs), (gated_scan, free_inputs)])
def test_float32_matches_the_oracle(op, make, shape, reverse):
    inputs = make(**shape)
    exact = run(op, inputs, dtype=torch.float64, backend="reference", reverse=reverse)
    found = run(op, on_gpu(inputs), reverse=reverse)
    for name, x in found.items():
        assert relative_error(x.cpu(), exact[name]).rms <= ORDINARY_RMS, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_low_precision_matches_the_oracle(shape, dtype):
    inputs = tied_inputs(**shape, dtype=dtype)
    exact = run(hgrn2_scan, inputs, dtype=torch.float64, backend="reference")
    for name, x in run(hgrn2_scan, on_gpu(inputs)).items():
        assert relative_error(x.cpu(), exact[name]).rms <= LOW_PRECISION_RMS[dtype], name


@pytest.mark.parametrize("log_f", [-1e-6, -1e-3, -1.0, -20.0, -50.0])
def test_extreme_gates(log_f):
    inputs = free_inputs(1, 500, 2, 16, 16)
    inputs["log_f"] = torch.full_like(inputs["log_f"], log_f)
    exact = run(gated_scan, inputs, dtype=torch.float64, backend="reference")
    for name, x in run(gated_scan, on_gpu(inputs)).items():
        assert relative_error(x.cpu(), exact[name]).rms <= EXTREME_RMS, name


def test_two_runs_give_the_same_bits():
    inputs = on_gpu(tied_inputs(2, 700, 4, 64, 64, dtype=torch.bfloat16))
    first, second = run(hgrn2_scan, inputs), run(hgrn2_scan, inputs)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_steps_match_the_scan():
    inputs = on_gpu(tied_inputs(2, 20, 2, 16, 16))
    whole, end = hgrn2_scan(**inputs)
    state = inputs["initial_state"]
    for t in range(20):
        y, state = hgrn2_step(inputs["q"][:, t], inputs["f"][:, t], inputs["v"][:, t], state, inputs["lower_bound"])
        assert relative_error(y, whole[:, t]).rms <= ORDINARY_RMS
    assert relative_error(state, end).rms <= ORDINARY_RMS


# torch's compiler warns of its own ways and of the card's
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_learns_under_autocast(compiled):
    torch.manual_seed(0)
    model = HGRN2LM(presets.tiny(vocab_size=64, hidden_size=128, num_hidden_layers=2, intermediate_size=128)).cuda()
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
    torch.manual_seed(0)
    model = HGRN2LM(presets.tiny(vocab_size=64, hidden_size=128, num_hidden_layers=2, intermediate_size=128)).eval()
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
