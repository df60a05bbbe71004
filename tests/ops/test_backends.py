"""Which backend runs, and what is said where one cannot. No kernel runs here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings

import pytest
import torch

from hgrn2.ops import backends, hgrn2_scan, hgrn2_step, resolve_backend
from tests.ops.scan_cases import tied_inputs

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def usable_triton(monkeypatch):
    """As with a Triton that compiles for a GPU, whatever is installed here; nothing warned of yet."""
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", None)
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    monkeypatch.setattr(backends, "_warned", False)


def refused(*arguments) -> str:
    with pytest.raises(ValueError, match="backend") as caught:
        resolve_backend(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gets_the_kernels(dtype):
    for wanted in ("auto", "triton"):
        assert resolve_backend(wanted, CUDA, dtype, 256, 256) == "triton"
        assert resolve_backend(wanted, torch.device("cuda", 3), dtype, 16, 17) == "triton"
    for wanted in ("chunked", "reference"):
        assert resolve_backend(wanted, CUDA, dtype, 128, 128) == wanted


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_other_devices_get_plain_torch(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert resolve_backend("auto", device, dtype, 128, 128) == "chunked"


@pytest.mark.parametrize(
    ("device", "dtype", "k_width", "v_width", "reason"),
    [
        (CPU, torch.float32, 64, 64, "the inputs are on cpu"),
        (META, torch.float32, 64, 64, "the inputs are on meta"),
        (CUDA, torch.float64, 64, 64, "do not take torch.float64"),
        (CUDA, torch.bfloat16, 257, 64, "K is 257 and V 64"),
        (CUDA, torch.bfloat16, 64, 512, "take 16 to 256"),
        (CUDA, torch.bfloat16, 15, 64, "take 16 to 256"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_kernels_cannot_take(device, dtype, k_width, v_width, reason):
    text = refused("triton", device, dtype, k_width, v_width)
    assert "'triton' cannot run" in text
    assert reason in text
    assert "'chunked'" in text
    # auto falls back without a word: nothing the user could install would change it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", device, dtype, k_width, v_width) == "chunked"


def test_gpus_of_others_get_plain_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert resolve_backend("auto", CUDA, torch.bfloat16, 128, 128) == "chunked"
    assert "GPUs of NVIDIA" in refused("triton", CUDA, torch.bfloat16, 128, 128)


def test_a_missing_triton_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "Triton is not installed")
    arguments = ("auto", CUDA, torch.float32, 64, 64)
    with pytest.warns(RuntimeWarning, match="Triton is not installed: .*slower"):
        assert resolve_backend(*arguments) == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend(*arguments) == "chunked"
    assert "Triton is not installed" in refused("triton", CUDA, torch.float32, 64, 64)


def test_nothing_is_said_of_triton_where_it_would_not_run(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "Triton is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", CPU, torch.float32, 64, 64) == "chunked"
        assert resolve_backend("auto", CUDA, torch.float64, 64, 64) == "chunked"
        assert resolve_backend("chunked", CUDA, torch.float32, 64, 64) == "chunked"


def test_unknown_names():
    for name in ("gpu", "", "Triton", None):
        text = refused(name, CPU, torch.float32, 64, 64)
        assert all(repr(known) in text for known in backends.BACKENDS)


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "plain", "reason"),
    [
        (CPU, torch.bfloat16, (128, 128), True, "the inputs are on cpu"),
        (CUDA, torch.float32, (128, 128), True, "do not take torch.float32"),
        (CUDA, torch.bfloat16, (128, 64), True, "K is 128 and V 64"),
        (CUDA, torch.bfloat16, (128, 128), False, "no key of its own"),
        (CUDA, torch.bfloat16, (128, 128), True, "no such chip"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_cuda_kernels_cannot_take(monkeypatch, device, dtype, widths, plain, reason):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(backends, "_device_problem", lambda index: "no such chip")
    text = refused("cuda", device, dtype, *widths, plain)
    assert "'cuda' cannot run" in text
    assert reason in text
    assert resolve_backend("auto", device, dtype, *widths, plain) == ("chunked" if device == CPU else "triton")


def test_a_chip_with_kernels_of_its_own_gets_them(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(backends, "_device_problem", lambda index: None)
    for wanted in ("auto", "cuda"):
        assert resolve_backend(wanted, CUDA, torch.bfloat16, 128, 128) == "cuda"
    monkeypatch.setattr(backends, "_TRITON_PROBLEM", "Triton is not installed")
    for wanted in ("auto", "cuda"):
        assert resolve_backend(wanted, CUDA, torch.bfloat16, 128, 128) == "cuda"
    # the backward pass of float16 is Triton's
    assert "Triton is not installed" in refused("cuda", CUDA, torch.float16, 128, 128)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert resolve_backend("auto", CUDA, torch.float16, 128, 128) == "chunked"


def test_operators_pass_the_reason_on():
    inputs = tied_inputs(1, 3)
    with pytest.raises(ValueError, match="'triton' cannot run: the inputs are on cpu"):
        hgrn2_scan(**inputs, backend="triton")
    q, f, v = (inputs[name][:, 0] for name in "qfv")
    with pytest.raises(ValueError, match="'triton' cannot run: the inputs are on cpu"):
        hgrn2_step(q, f, v, inputs["initial_state"], backend="triton")


def installed(monkeypatch, versions: dict[str, str]) -> str | None:
    """What is said of Triton where these packages are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if versions else None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return backends._triton_problem()


@pytest.mark.parametrize("name", ["triton", "pytorch-triton", "triton-windows"])
@pytest.mark.parametrize("version", ["3.6.0", "3.10.1", "4.0.0", "3.6.0+git1234abcd"])
def test_versions_that_will_do(monkeypatch, name, version):
    assert installed(monkeypatch, {name: version}) is None


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0", "3.5.0+git1234abcd"])
def test_versions_that_are_too_old(monkeypatch, version):
    problem = installed(monkeypatch, {"triton": version})
    assert problem is not None
    assert re.fullmatch(rf"Triton is {re.escape(version)}; wanted 3\.6 or newer", problem)


def test_no_triton(monkeypatch):
    assert installed(monkeypatch, {}) == "Triton is not installed"
