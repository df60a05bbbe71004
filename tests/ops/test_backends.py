"""Choice of a backend, rejections and registration. No kernel runs here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hgrn2.ops import hgrn2_scan, hgrn2_step, resolve_backend
from hgrn2.ops.backends import backend_names, base, find, register, registered, set_auto_order, unregister
from hgrn2.ops.backends.cuda import CudaBackend
from hgrn2.ops.backends.narrow import NarrowBackend
from hgrn2.ops.backends.triton import TritonBackend
from hgrn2.ops.call import CallTraits
from hgrn2.ops.triton import installed
from tests.ops.scan_cases import tied_inputs
from tests.refusals import refuses

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
NO_TRITON = "Triton is not installed"


class AnyChip(CudaBackend):
    """The CUDA kernels on a machine with or without a chip for them."""

    def __init__(self, problem: str | None):
        self.problem = problem

    def device_problem(self, index: int) -> str | None:
        return self.problem


@contextmanager
def machine(triton: str | None = None, chip: str | None = "no such chip") -> Iterator[None]:
    """A machine with these problems, whatever is installed here."""
    order = ("cuda", "triton", "chunked")
    kernels = (TritonBackend(triton, is_interpreted=False), NarrowBackend(triton, is_interpreted=False))
    with registered(*kernels, AnyChip(chip), auto_order=order):
        yield


@pytest.fixture(autouse=True)
def usable_triton(monkeypatch):
    """As with a Triton that compiles for a GPU, and no chip that the CUDA kernels are for; nothing warned of yet."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(base, "_warned", False)
    with machine():
        yield


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
    ("device", "dtype", "k_width", "v_width", "named"),
    [
        (CPU, torch.float32, 64, 64, ("cpu",)),
        (META, torch.float32, 64, 64, ("meta",)),
        (CUDA, torch.float64, 64, 64, ("torch.float64",)),
        (CUDA, torch.bfloat16, 257, 64, (257, 64)),
        (CUDA, torch.bfloat16, 64, 1025, (16, 1024)),
        (CUDA, torch.bfloat16, 15, 64, (16, 256)),
        (CUDA, torch.bfloat16, 64, 8, (16, 256)),
    ],
    ids=lambda value: str(value),
)
def test_what_the_kernels_cannot_take(device, dtype, k_width, v_width, named):
    with refuses("unsupported", "'triton'", "'chunked'", *named) as caught:
        resolve_backend("triton", device, dtype, k_width, v_width)
    assert "\n" not in str(caught.value)
    # auto falls back without a word: nothing the user could install would change it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", device, dtype, k_width, v_width) == "chunked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(1, 1), (2, 2), (8, 8), (15, 16), (16, 3)], ids=str)
def test_narrow_heads_get_kernels_of_their_own(widths, dtype):
    for cuda_eligible in (False, True):
        assert resolve_backend("narrow", CUDA, dtype, *widths, cuda_eligible=cuda_eligible) == "narrow"
    # by name only, until they have run on a GPU
    assert resolve_backend("auto", CUDA, dtype, *widths) == "chunked"
    with refuses("unsupported", "'triton'", *widths):
        resolve_backend("triton", CUDA, dtype, *widths)
    assert resolve_backend("chunked", CUDA, dtype, *widths) == "chunked"
    for wanted in ("auto", "narrow"):
        assert base.choose(wanted, CallTraits(CUDA, dtype, *widths, is_step=True)).name == "chunked"
    with machine(NO_TRITON), refuses("unavailable", "'narrow'", NO_TRITON):
        resolve_backend("narrow", CUDA, dtype, *widths)


@pytest.mark.parametrize(
    ("device", "dtype", "widths"),
    [(CPU, torch.float32, (8, 8)), (META, torch.float32, (8, 8)), (CUDA, torch.float64, (8, 8)),
     (CUDA, torch.float32, (8, 17)), (CUDA, torch.float32, (17, 8))],
    ids=str,
)  # fmt: skip
def test_what_the_narrow_kernels_cannot_take(device, dtype, widths):
    with refuses("unsupported", "'narrow'"):
        resolve_backend("narrow", device, dtype, *widths)
    assert resolve_backend("auto", device, dtype, *widths) == "chunked"


def test_gpus_of_others_get_plain_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    for width in (8, 128):
        assert resolve_backend("auto", CUDA, torch.bfloat16, width, width) == "chunked"
    with refuses("unsupported", "'narrow'", "NVIDIA"):
        resolve_backend("narrow", CUDA, torch.bfloat16, 8, 8)
    with refuses("unsupported", "'triton'", "NVIDIA"):
        resolve_backend("triton", CUDA, torch.bfloat16, 128, 128)


def test_a_missing_triton_is_warned_of_once():
    arguments = ("auto", CUDA, torch.float32, 64, 64)
    with machine(NO_TRITON):
        with pytest.warns(RuntimeWarning, match="Triton is not installed: .*slower"):
            assert resolve_backend(*arguments) == "chunked"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve_backend(*arguments) == "chunked"
        with refuses("unavailable", NO_TRITON):
            resolve_backend("triton", CUDA, torch.float32, 64, 64)


def test_nothing_is_said_of_triton_where_it_would_not_run():
    with machine(NO_TRITON), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", CPU, torch.float32, 64, 64) == "chunked"
        assert resolve_backend("auto", CUDA, torch.float64, 64, 64) == "chunked"
        assert resolve_backend("chunked", CUDA, torch.float32, 64, 64) == "chunked"


@pytest.mark.parametrize("name", ["gpu", "", "Triton", None, ["triton"]])
def test_unknown_names(name):
    with refuses("unknown-name", repr(name), *map(repr, backend_names())):
        resolve_backend(name, CPU, torch.float32, 64, 64)
    with refuses("unknown-name", repr(name)):
        find(name)


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "eligible", "named"),
    [
        (CPU, torch.bfloat16, (128, 128), True, "cpu"),
        (CUDA, torch.float32, (128, 128), True, "torch.float32"),
        (CUDA, torch.bfloat16, (128, 64), True, "K is 128 and V 64"),
        (CUDA, torch.bfloat16, (128, 128), False, "65,536"),
        (CUDA, torch.bfloat16, (128, 128), True, "no such chip"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_cuda_kernels_cannot_take(device, dtype, widths, eligible, named):
    with refuses("unsupported", "'cuda'", named):
        resolve_backend("cuda", device, dtype, *widths, eligible)
    assert resolve_backend("auto", device, dtype, *widths, eligible) == ("chunked" if device == CPU else "triton")


def test_a_chip_with_kernels_of_its_own_gets_them():
    for triton in (None, NO_TRITON):
        with machine(triton, chip=None):
            for wanted in ("auto", "cuda"):
                assert resolve_backend(wanted, CUDA, torch.bfloat16, 128, 128) == "cuda"
    with machine(NO_TRITON, chip=None):
        # the backward pass of float16 is Triton's
        with refuses("unavailable", NO_TRITON):
            resolve_backend("cuda", CUDA, torch.float16, 128, 128)
        with pytest.warns(RuntimeWarning, match=NO_TRITON):
            assert resolve_backend("auto", CUDA, torch.float16, 128, 128) == "chunked"


@pytest.mark.parametrize(
    "traits",
    [
        CallTraits(CUDA, torch.bfloat16, 128, 128, batch=1 << 16),
        CallTraits(CUDA, torch.bfloat16, 128, 128, is_tied=False),
        CallTraits(CUDA, torch.bfloat16, 128, 128, is_step=True),
    ],
    ids=["batch", "key", "step"],
)
def test_calls_that_the_cuda_kernels_leave_to_triton(traits):
    with machine(chip=None):
        assert base.choose("auto", traits).name == "triton"
        assert base.choose("auto", traits._replace(batch=65535, is_tied=True, is_step=False)).name == "cuda"


def test_a_step_asked_of_cuda_is_triton_s_or_plain_torch():
    step = CallTraits(CUDA, torch.float32, 64, 64, is_step=True)
    assert base.choose("cuda", step).name == "triton"
    with machine(NO_TRITON):
        assert base.choose("cuda", step).name == "chunked"
    for traits in (step._replace(device=CPU), step._replace(k_width=512)):
        with refuses("unsupported", "'triton'"):
            base.choose("cuda", traits)


def test_operators_pass_the_reason_on():
    inputs = tied_inputs(1, 3)
    with refuses("unsupported", "'triton'", "cpu"):
        hgrn2_scan(**inputs, backend="triton")
    q, f, v = (inputs[name][:, 0] for name in "qfv")
    with refuses("unsupported", "'triton'", "cpu"):
        hgrn2_step(q, f, v, inputs["initial_state"], backend="triton")


class Nothing(base.Backend):
    """A backend with every part, none of which works."""

    name = "nothing"

    def rejects(self, traits):
        return "it does nothing"

    def forward(self, call, plan):
        raise AssertionError

    def backward(self, call, plan, kept, dy, d_final_state, bound_wanted):
        raise AssertionError

    def step(self, call, in_place):
        raise AssertionError


@pytest.mark.parametrize("name", ["chunked", "auto"])
def test_a_name_is_registered_once(name):
    backend = Nothing()
    backend.name = name
    with refuses("already-exists", repr(name)):
        register(backend)
    assert find("chunked").name == "chunked"


@pytest.mark.parametrize("part", ["rejects", "forward", "backward", "step"])
def test_a_part_that_is_missing_is_named(part):
    members = {key: value for key, value in vars(Nothing).items() if key != part}
    with refuses("incomplete", "'nothing'", part):
        register(type("Lacking", (base.Backend,), members)())
    # and where nothing is inherited
    with refuses("incomplete", "'nothing'", part, "plan", "kept_shape"):
        register(type("Alone", (), members)())
    assert "nothing" not in backend_names()


def test_a_name_that_is_missing():
    members = {key: value for key, value in vars(Nothing).items() if key != "name"}
    with refuses("incomplete", "name"):
        register(type("Nameless", (base.Backend,), members)())


def test_what_is_registered_can_be_forgotten():
    register(Nothing())
    try:
        assert backend_names()[-1] == "nothing"
        set_auto_order("nothing", "chunked")
        assert resolve_backend("auto", CPU, torch.float32, 1, 1) == "chunked"
        with refuses("unsupported", "'nothing'", "it does nothing"):
            resolve_backend("nothing", CPU, torch.float32, 1, 1)
    finally:
        unregister("nothing")
    assert base.auto_order() == ("chunked",)
    with refuses("unknown-name", "'nothing'"):
        unregister("nothing")
    with refuses("unknown-name", "'nothing'"):
        set_auto_order("nothing")


def test_auto_without_a_backend_for_the_call():
    with registered(Nothing(), auto_order=("nothing",)), refuses("unsupported", "'auto'", "nothing"):
        hgrn2_scan(**tied_inputs(1, 3))
    assert base.auto_order() == ("cuda", "triton", "chunked")


def problem_with(monkeypatch, versions: dict[str, str]) -> str | None:
    """Return the problem of Triton where these packages are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if versions else None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed.find_problem()


@pytest.mark.parametrize("name", ["triton", "pytorch-triton", "triton-windows"])
@pytest.mark.parametrize("version", ["3.6.0", "3.10.1", "4.0.0", "3.6.0+git1234abcd"])
def test_versions_that_will_do(monkeypatch, name, version):
    assert problem_with(monkeypatch, {name: version}) is None


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0", "3.5.0+git1234abcd"])
def test_versions_that_are_too_old(monkeypatch, version):
    problem = problem_with(monkeypatch, {"triton": version})
    assert problem is not None
    assert re.fullmatch(rf"Triton is {re.escape(version)}; wanted 3\.6 or newer", problem)


def test_no_triton(monkeypatch):
    assert problem_with(monkeypatch, {}) == NO_TRITON
