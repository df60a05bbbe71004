"""Inputs that do not fit are refused with a line that names the argument, the value found and the one wanted."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step, resolve_backend
from tests.ops.scan_cases import free_inputs, tied_inputs
from tests.refusals import refuses


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(shape, **options)


def with_value(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[1] = value
    return x


def refuse(op, arguments, *words: str, code: str = "invalid-value") -> None:
    with refuses(code, *words) as caught:
        op(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    # names as words of their own
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}", text), f"{word!r} is not in {text!r}"


def code_for(name: str, value: object) -> str:
    return {"cuda": "unsupported"}.get(str(value), "unknown-name") if name == "backend" else "invalid-value"


# B 2, T 10, H 2, K 6, V 5: argument, bad value, what the message must say
TIED = [
    ("q", ones(2, 10, 12), "q", "[2, 10, 12]", "[B, T, H, K]"),
    ("v", ones(2, 10, 10), "v", "[2, 10, 10]", "[B, T, H, V]"),
    ("f", ones(2, 10, 2, 5), "f", "[2, 10, 2, 5]", "K=6"),
    ("f", ones(2, 10, 12), "f", "[2, 10, 12]", "[B, T, H, K]"),
    ("f", ones(1, 10, 2, 6), "f", "[1, 10, 2, 6]", "B=2"),
    ("v", ones(2, 9, 2, 5), "v", "[2, 9, 2, 5]", "T=10"),
    ("v", ones(2, 10, 1, 5), "v", "[2, 10, 1, 5]", "H=2"),
    ("q", ones(2, 10, 2, 6, dtype=torch.int64), "q", "torch.int64", "torch.float32"),
    ("q", ones(2, 10, 2, 6, dtype=torch.complex64), "q", "torch.complex64", "torch.float32"),
    ("f", ones(2, 10, 2, 6, dtype=torch.bfloat16), "f", "torch.bfloat16", "torch.float32"),
    ("v", ones(2, 10, 2, 5, dtype=torch.float64), "v", "torch.float64", "torch.float32"),
    ("f", ones(2, 10, 2, 6, device="meta"), "f", "meta", "cpu"),
    ("v", ones(2, 10, 2, 5, device="meta"), "v", "meta", "cpu"),
    ("q", ones(2, 10, 2, 6, device="meta"), "q", "meta", "cpu"),
    ("lower_bound", ones(6), "lower_bound", "[6]", "[H, K]"),
    ("lower_bound", ones(2, 5) / 2, "lower_bound", "[2, 5]", "K=6"),
    ("lower_bound", ones(2, 6, dtype=torch.bfloat16) / 2, "lower_bound", "torch.bfloat16", "torch.float32"),
    ("lower_bound", ones(2, 6, dtype=torch.float64) / 2, "lower_bound", "torch.float64", "torch.float32"),
    ("lower_bound", ones(2, 6, device="meta") / 2, "lower_bound", "meta", "cpu"),
    ("lower_bound", ones(2, 6), "lower_bound", "1", "[0, 1)"),
    ("lower_bound", with_value(ones(2, 6) / 2, -1e-3), "lower_bound", "-0.001", "[0, 1)"),
    ("lower_bound", with_value(ones(2, 6) / 2, 1.5), "lower_bound", "1.5", "[0, 1)"),
    ("lower_bound", with_value(ones(2, 6) / 2, math.nan), "lower_bound", "nan", "[0, 1)"),
    ("lower_bound", with_value(ones(2, 6) / 2, math.inf), "lower_bound", "inf", "[0, 1)"),
    ("initial_state", ones(2, 2, 5, 6), "initial_state", "[2, 2, 5, 6]", "[N, H, K, V]"),
    ("initial_state", ones(1, 2, 6, 5), "initial_state", "[1, 2, 6, 5]", "N=2"),
    ("initial_state", ones(2, 2, 6), "initial_state", "[2, 2, 6]", "[N, H, K, V]"),
    ("initial_state", ones(2, 2, 6, 5, dtype=torch.float16), "initial_state", "torch.float16", "torch.float32"),
    ("initial_state", ones(2, 2, 6, 5, device="meta"), "initial_state", "meta", "cpu"),
    ("q_activation", "relu", "q_activation", "'relu'", "'silu'"),
    ("q_activation", None, "q_activation", "None", "'silu'"),
    ("v_activation", "sigmoid", "v_activation", "'sigmoid'", "'none'"),
    ("backend", "cuda", "backend", "'cuda'", "'chunked'"),
    ("q", None, "q", "None", "a tensor"),
    ("q", [[1.0]], "q", "a list", "a tensor"),
    ("f", np.ones((2, 10, 2, 6)), "f", "a ndarray", "a tensor"),
    ("lower_bound", np.ones((2, 6)), "lower_bound", "a ndarray", "a tensor"),
    ("lower_bound", 0.5, "lower_bound", "0.5", "a tensor"),
    ("initial_state", np.ones((2, 2, 6, 5)), "initial_state", "a ndarray", "a tensor"),
    ("cu_seqlens", np.array([0, 10]), "cu_seqlens", "a ndarray", "a tensor"),
    ("cu_seqlens", [0, 10], "cu_seqlens", "a list", "a tensor"),
    ("v", None, "v", "None", "a tensor"),
    ("f", None, "f", "None", "a tensor"),
    ("q", ones(2, 10, 2, 6).to_sparse(), "q", "torch.sparse_coo", "torch.strided"),
    ("f", ones(2, 10, 2, 6).to_sparse(), "f", "torch.sparse_coo", "torch.strided"),
    *(("scale", x, "scale", repr(x), "torch.float32") for x in (None, "1", 1j, math.nan, math.inf, -1e39, 10**40)),
    *(("reverse", x, "reverse", repr(x), "True") for x in (None, "no", 2, 0.0)),
    *(
        ("min_log_decay", x, "min_log_decay", repr(x), "[-69, 0)")
        for x in (0, 0.5, math.nan, "-3", torch.tensor([-3.0]), -70, -(10**400), -math.inf)
    ),
]


@pytest.mark.parametrize("case", TIED, ids=lambda case: f"{case[0]}-{case[2]}-{case[-2]}")
def test_scan_arguments(case):
    name, value, *words = case
    refuse(hgrn2_scan, tied_inputs(2, 10) | {name: value}, *words, code=code_for(name, value))


@pytest.mark.parametrize(
    "case",
    [
        ("k", ones(2, 10, 2, 5), "k", "[2, 10, 2, 5]", "K=6"),
        ("k", ones(2, 10, 2, 6, dtype=torch.float64), "k", "torch.float64", "torch.float32"),
        ("k", ones(2, 10, 2, 6, device="meta"), "k", "meta", "cpu"),
        ("log_f", -ones(2, 10, 2), "log_f", "[2, 10, 2]", "[B, T, H, K]"),
        ("log_f", -ones(2, 10, 2, 6).bfloat16(), "log_f", "torch.bfloat16", "torch.float32"),
        ("log_f", ones(2, 10, 2, 6, device="meta"), "log_f", "meta", "cpu"),
        ("log_f", with_value(-ones(2, 10, 2, 6), 1e-3), "log_f", "0.001", "at most 0"),
        ("log_f", with_value(-ones(2, 10, 2, 6), math.inf), "log_f", "inf", "at most 0"),
        ("initial_state", ones(1, 2, 6, 5), "initial_state", "[1, 2, 6, 5]", "N=2"),
        ("backend", "", "backend", "''", "'chunked'"),
        ("q", None, "q", "None", "a tensor"),
        ("k", "k", "k", "'k'", "a tensor"),
        ("scale", "1", "scale", "'1'", "torch.float32"),
        ("reverse", None, "reverse", "None", "True"),
    ],
    ids=lambda case: f"{case[0]}-{case[-2]}",
)
def test_gated_scan_arguments(case):
    name, value, *words = case
    refuse(gated_scan, free_inputs(2, 10) | {name: value}, *words, code=code_for(name, value))


@pytest.mark.parametrize("op", [hgrn2_scan, gated_scan], ids=lambda op: op.__name__)
@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        (torch.tensor([0, 4]), ("cu_seqlens", "[0, 4]", "T = 10")),
        (torch.tensor([0, 4, 11]), ("cu_seqlens", "[0, 4, 11]", "T = 10")),
        (torch.tensor([1, 10]), ("cu_seqlens", "[1, 10]", "wanted 0")),
        (torch.tensor([0, 6, 4, 10]), ("cu_seqlens", "[0, 6, 4, 10]", "non-decreasing")),
        (torch.tensor([0, -1, 10]), ("cu_seqlens", "[0, -1, 10]", "non-decreasing")),
        (torch.tensor([0] * 9 + [9]), ("cu_seqlens", "T = 10")),
        (torch.tensor([0]), ("cu_seqlens", "[0]", "T = 10")),
        (torch.tensor([], dtype=torch.int64), ("cu_seqlens", "[0]", "[N + 1]")),
        (torch.tensor(10), ("cu_seqlens", "[]", "[N + 1]")),
        (torch.tensor([[0, 10]]), ("cu_seqlens", "[1, 2]", "[N + 1]")),
        (torch.tensor([0.0, 10.0]), ("cu_seqlens", "torch.float32", "int32")),
        (torch.tensor([0, 10], dtype=torch.int16), ("cu_seqlens", "torch.int16", "int32")),
        (torch.tensor([0, 10], device="meta"), ("cu_seqlens", "meta", "cpu")),
    ],
    ids=lambda value: str(value.tolist() if value.device.type == "cpu" else "meta") if torch.is_tensor(value) else "",
)
def test_cu_seqlens(op, cu_seqlens, words):
    inputs = (tied_inputs if op is hgrn2_scan else free_inputs)(1, 10, state=False)
    refuse(op, inputs | {"cu_seqlens": cu_seqlens}, *words)


@pytest.mark.parametrize("op", [hgrn2_scan, gated_scan], ids=lambda op: op.__name__)
def test_cu_seqlens_want_one_row_and_a_state_each(op):
    make = tied_inputs if op is hgrn2_scan else free_inputs
    batch = make(2, 10, state=False) | {"cu_seqlens": torch.tensor([0, 10])}
    refuse(op, batch, "cu_seqlens", "2", "B = 1", code="contradiction")
    arguments = make(1, 10) | {"cu_seqlens": torch.tensor([0, 4, 10])}
    refuse(op, arguments, "initial_state", "[1, 2, 6, 5]", "N=2")


@pytest.mark.parametrize(
    "case",
    [
        ("q", ones(2, 1, 2, 6), "q", "[2, 1, 2, 6]", "[B, H, K]"),
        ("v", ones(2, 10), "v", "[2, 10]", "[B, H, V]"),
        ("v", ones(2, 1, 5), "v", "[2, 1, 5]", "H=2"),
        ("f", ones(2, 2, 5), "f", "[2, 2, 5]", "K=6"),
        ("f", ones(2, 2, 6).bfloat16(), "f", "torch.bfloat16", "torch.float32"),
        ("v", ones(2, 2, 5, device="meta"), "v", "meta", "cpu"),
        ("state", ones(2, 2, 5, 6), "state", "[2, 2, 5, 6]", "[B, H, K, V]"),
        ("state", ones(1, 2, 6, 5), "state", "[1, 2, 6, 5]", "B=2"),
        ("state", ones(2, 2, 6, 5).bfloat16(), "state", "torch.bfloat16", "torch.float32"),
        ("state", ones(2, 2, 6, 5, device="meta"), "state", "meta", "cpu"),
        ("lower_bound", ones(2, 6), "lower_bound", "1", "[0, 1)"),
        ("lower_bound", ones(12) / 2, "lower_bound", "[12]", "[H, K]"),
        ("q_activation", "gelu", "q_activation", "'gelu'", "'silu'"),
        ("v_activation", "gelu", "v_activation", "'gelu'", "'none'"),
        ("backend", "fast", "backend", "'fast'", "'reference'"),
        ("q", None, "q", "None", "a tensor"),
        ("v", ones(2, 2, 5).to_sparse(), "v", "torch.sparse_coo", "torch.strided"),
        ("scale", math.nan, "scale", "nan", "torch.float32"),
    ],
    ids=lambda case: f"{case[0]}-{case[-2]}",
)
def test_step_arguments(case):
    name, value, *words = case
    arguments = {"q": ones(2, 2, 6), "f": ones(2, 2, 6), "v": ones(2, 2, 5), "state": ones(2, 2, 6, 5)}
    refuse(hgrn2_step, arguments | {name: value}, *words, code=code_for(name, value))


@pytest.mark.parametrize("op", [hgrn2_scan, gated_scan], ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("empty", ["heads", "k_width", "v_width"])
def test_no_head_or_no_channel(op, backend, empty):
    sizes = {"batch": 2, "length": 10, "heads": 2, "k_width": 6, "v_width": 5} | {empty: 0}
    inputs = (tied_inputs if op is hgrn2_scan else free_inputs)(*sizes.values())
    refuse(op, inputs | {"backend": backend}, "q and v", "0", "at least 1")


def test_backends_resolve():
    for device in (torch.device("cpu"), torch.device("meta")):
        for wanted, found in (("auto", "chunked"), ("chunked", "chunked"), ("reference", "reference")):
            assert resolve_backend(wanted, device, torch.float32, 128, 128) == found
    cuda = torch.device("cuda")
    for unsuitable in ((torch.float64, 64, 64), (torch.bfloat16, 512, 64)):
        assert resolve_backend("auto", cuda, *unsuitable) == "chunked"


def test_bounds_of_the_valid_range_are_accepted():
    inputs = tied_inputs(1, 5)
    for value in (0.0, 1 - 2**-24):
        inputs["lower_bound"] = torch.full((2, 6), value)
        y, state = hgrn2_scan(**inputs)
        assert y.isfinite().all()
        assert state.isfinite().all()
    free = free_inputs(1, 5)
    free["log_f"] = torch.full((1, 5, 2, 6), -0.0)
    y, _ = gated_scan(**free)
    assert y.isfinite().all()


def test_float32_states_and_bounds_fit_float64_inputs():
    inputs = tied_inputs(1, 5, dtype=torch.float64)
    wanted, wanted_state = hgrn2_scan(**inputs)
    mixed = inputs | {name: inputs[name].float() for name in ("lower_bound", "initial_state")}
    y, state = hgrn2_scan(**mixed)
    assert y.dtype == state.dtype == torch.float64
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, wanted_state, rtol=1e-5, atol=1e-6)
