"""What can be said of the CUDA kernels without a GPU; `test_gpu.py` runs them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from hgrn2.ops.cuda import compiler, launch, plan

SOURCES = Path(launch.__file__).parent
# C's names of ctypes' types; a pointer is one whatever it points to
C_TYPES = {"i64": ctypes.c_longlong, "int": ctypes.c_int, "float": ctypes.c_float}


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
            found.append((field.strip(" *"), kind))
    return found


@pytest.mark.parametrize(
    ("structure", "file"), [(launch.WalkArguments, "walk.cu"), (launch.GradientArguments, "gradient.cu")]
)
def test_arguments_are_laid_out_as_in_c(structure, file):
    assert fields_in_c(structure.__name__, file) == list(structure._fields_)


@pytest.mark.parametrize("name", ["walk.cu", "gradient.cu"])
@pytest.mark.parametrize(("bfloat16", "q_activation"), [(1, 0), (1, 1), (0, 2)])
def test_the_kernels_compile(name, bfloat16, q_activation):
    try:
        compiler._compiler()
    except OSError:
        pytest.skip("NVRTC comes with torch's CUDA builds")
    options = ("-arch=sm_90a", "--std=c++17", "-default-device")
    settings = (f"-DBFLOAT16={bfloat16}", f"-DQ_ACTIVATION={q_activation}")
    assert compiler._compile(launch._source(name), (*options, *settings))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 2048, 8192, 32768, 131072, 1 << 20])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 16), (2, 7), (4, 16), (16, 16), (33, 20), (300, 2)])
def test_the_plan_covers_every_chunk_and_head(batch, heads, length):
    chunks = plan.num_chunks(length)
    coarse = plan.coarse_chunks(batch, length, heads)
    q = torch.empty(batch, length, heads, plan.WIDTH, dtype=torch.bfloat16, device="meta")
    cut = launch.Plan(launch.Scan(q, q, q, None, None, False, 1.0, "silu"), coarse)
    assert [h for group in cut.groups for h in range(group.first, group.first + group.count)] == list(range(heads))
    # the room of the first group is that of all
    assert max(group.count for group in cut.groups) == cut.groups[0].count
    head_bytes = batch * chunks * plan.WIDTH * plan.WIDTH * 2
    assert cut.groups[0].count == 1 or cut.groups[0].count * head_bytes <= plan.STATE_BYTES
    # a segment of the forward pass begins where a coarse state is
    assert cut.forward_chunks % coarse == 0
    assert 1 <= coarse <= max(chunks, 1)
    rows = batch * cut.groups[0].count
    segments = -(-chunks // coarse)
    assert segments == 1 or rows * (segments - 1) <= plan.MULTIPROCESSORS
    pieces = launch.coarse_shape(batch, length, heads, coarse)[1]
    assert pieces == (segments if segments > 1 else 0)


def test_nothing_to_keep_without_a_gradient():
    assert launch.coarse_shape(2, 1000, 3, 0) == (2, 0, 3, 128, 128)
