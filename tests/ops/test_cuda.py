"""The CUDA kernels without a GPU: layout of arguments, compilation, division of the work; `test_gpu.py` runs them."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import threading
from pathlib import Path

import pytest
import torch

from hgrn2.ops.backends.cuda import arguments, compiler, kernels, launch, plan
from hgrn2.ops.gates import Floor

SOURCES = Path(kernels.__file__).parent
# C's names of ctypes' types; a pointer is one whatever it points to
C_TYPES = {"i64": ctypes.c_longlong, "int": ctypes.c_int, "float": ctypes.c_float}

needs_compiler = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the compiler's wheel is for Linux on x86_64"
)


def fields_in_c(name: str, file: str) -> list[tuple[str, type]]:
    """Fields of a struct, in order."""
    body = re.search(rf"struct {name} {{(.*?)}};", (SOURCES / file).read_text(), re.DOTALL)
    assert body is not None, f"no struct {name} in {file}"
    found = []
    for statement in re.sub(r"//.*", "", body[1]).split(";"):
        words = statement.split()
        if not words:
            continue
        names = statement.strip().removeprefix("const ").split(None, 1)[1]
        for field in names.split(","):
            kind = ctypes.c_void_p if "*" in statement else C_TYPES[words[0]]
            name, _, count = field.strip(" *").partition("[")
            found.append((name, kind * int(count[:-1]) if count else kind))
    return found


@pytest.mark.parametrize(
    ("structure", "file"),
    [
        (arguments.ForwardArguments, "forward.cuh"),
        (arguments.BackwardArguments, "gradients.cuh"),
        (arguments.BoundsArguments, "bounds.cuh"),
        (arguments.CarryArguments, "carry.cuh"),
        (arguments.PackedArguments, "packed.cuh"),
    ],
)
def test_arguments_are_laid_out_as_in_c(structure, file):
    assert fields_in_c(structure.__name__, file) == list(structure._fields_)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["forward.cu", "backward.cu", "backward_exact.cu"])
@pytest.mark.parametrize(
    "settings",
    [
        kernels.Settings(torch.bfloat16, "none", True, Floor.of(-69)),
        kernels.Settings(torch.bfloat16, "silu", False, Floor.of(None)),
        kernels.Settings(torch.float16, "sigmoid", True, Floor.of(-3.0)),
    ],
)
def test_the_kernels_compile(name, settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert compiler._compile(kernels.source(name), kernels._options(settings, 0))


@needs_compiler
def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)could not compile.*nonsense"):
        compiler._compile("nonsense;", ("-arch=sm_90a",))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 2048, 8192, 32768, 131072, 1 << 20])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 16), (2, 7), (4, 16), (16, 16), (33, 20), (300, 2)])
def test_the_plan_covers_every_chunk_and_head(batch, heads, length):
    chunks, coarse = plan.num_chunks(length), plan.coarse_chunks(batch, length, heads)
    cut = plan.Plan(batch, length, heads, coarse)
    assert [h for group in cut.groups for h in range(group.first, group.first + group.count)] == list(range(heads))
    # the room of the first group, and of the first part in time, is that of all
    assert max(group.count for group in cut.groups) == cut.groups[0].count
    parts = cut.parts
    assert max(part.chunks for part in parts) == parts[-1].chunks
    assert [c for part in reversed(parts) for c in range(part.first, part.end)] == list(range(chunks))
    rows = batch * cut.groups[0].count
    states = rows * parts[-1].chunks
    assert states <= plan.MAX_STATES or parts[-1].chunks <= plan.MIN_SEGMENT_CHUNKS
    for stretch in (*parts, cut.whole):
        assert (stretch.segments - 1) * stretch.segment < stretch.chunks <= stretch.segments * stretch.segment
    # one wave of programs, if there are so few rows
    assert all(part.segments == 1 or part.segments * rows <= plan.MULTIPROCESSORS for part in parts)
    # the forward pass keeps the state that each segment of each part begins with
    begins = [part.first + i * part.segment for part in parts for i in range(part.segments)]
    assert sorted(begins) == [coarse * i for i in range(cut.pieces + 1)]


def test_nothing_to_keep_without_a_gradient():
    assert plan.coarse_pieces(1000, 0) == 0


def test_inputs_at_any_address_can_be_read_16_bytes_at_a_time():
    memory = torch.arange(4097, dtype=torch.float32).bfloat16()
    for x in (memory[1:].view(1, 32, 1, 128), memory[:-1].view(1, 32, 1, 128), memory[4:1028].view(1, 16, 1, 64)):
        found = launch._aligned(x)
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, x)


def test_rows_too_far_apart_for_the_kernels_are_copied():
    x = torch.zeros(1, 1, 2, 128, dtype=torch.bfloat16)
    near, far = (x.as_strided(x.shape, (0, step, 128, 1)) for step in (2**27, 2**28))
    assert launch._aligned(near) is near
    assert launch._aligned(far).is_contiguous()


def test_a_kernel_is_loaded_on_its_own_device(monkeypatch):
    current, loaded = [0], []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(compiler, "load", lambda *_: loaded.append(current[-1]))
    kernels.compiled.__wrapped__("sum_bounds", kernels.Settings(torch.bfloat16, "none", False, Floor.of(None)), 1)
    assert loaded == [1]


class Driver:
    """One that takes what was compiled and nothing else."""

    def __init__(self):
        self.loaded = []

    def cuModuleLoadData(self, module, binary):
        self.loaded.append(binary)
        return 0 if binary == b"kernels" else 200


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = Driver()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_driver", lambda: driver)
    monkeypatch.setattr(compiler, "_compile", lambda source, options: b"kernels")
    monkeypatch.setattr(compiler._compiler(), "nvrtcVersion", lambda *_: 0, raising=False)
    compiler._module.cache_clear()
    compiler.begin.cache_clear()
    yield driver
    compiler._module.cache_clear()
    compiler.begin.cache_clear()


@needs_compiler
def test_what_was_compiled_is_kept(driver, tmp_path):
    for device in range(2):
        compiler._module("source", (), device)
    (kept,) = (tmp_path / "cache").rglob("*.cubin")
    assert kept.read_bytes() == b"kernels"
    assert driver.loaded == [b"kernels"] * 2
    # what a crash left behind is made anew
    kept.write_bytes(b"")
    compiler.begin.cache_clear()
    compiler._module("source", (), 2)
    assert driver.loaded[2:] == [b"", b"kernels"]
    assert kept.read_bytes() == b"kernels"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@needs_compiler
def test_what_was_begun_is_not_compiled_again(driver, monkeypatch):
    go, compiled = threading.Event(), []

    def compile_when_told(source, options):
        assert go.wait(10)
        compiled.append(source)
        return b"kernels"

    monkeypatch.setattr(compiler, "_compile", compile_when_told)
    for _ in range(2):
        compiler.begin("source", ())
    go.set()
    for device in range(2):
        compiler._module("source", (), device)
    assert compiled == ["source"]
    assert driver.loaded == [b"kernels"] * 2


@needs_compiler
def test_no_folder_to_keep_it_in(driver, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    compiler._module("source", (), 0)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiler.Path, "home", no_home)
    compiler._module("source", (), 1)
    assert driver.loaded == [b"kernels"] * 2


@pytest.mark.parametrize("num_packed", [1, 8, 64])
@pytest.mark.parametrize("heads", [4, 6, 16])
def test_parts_of_the_backward_pass_are_equally_long(heads, num_packed):
    cut = plan.Plan(1, 32768, heads, plan.coarse_chunks(1, 32768, heads, num_packed), num_packed)
    # chunks that one multiprocessor walks, one launch after the other, and those there would be without idle ones
    walked = sum(part.segment for part in cut.parts)
    least = cut.chunks * heads / plan.MULTIPROCESSORS
    assert walked <= least + len(cut.parts) + 1
