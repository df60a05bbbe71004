"""Every Triton kernel compiles for a Hopper GPU, which this machine need not have; see `hopper.py`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import hgrn2
from hgrn2.ops.triton import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(installed.PROBLEM is not None, reason=str(installed.PROBLEM)),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton's wheels are for Linux on x86_64"
    ),
]
# shared memory of a program on a Hopper GPU, in bytes
MOST_SHARED = 227 << 10


@pytest.fixture(scope="module")
def found(request):
    """Return the output of `hopper.py`; what it compiles is cached beside pytest's own cache."""
    folder = request.config.cache.mkdir("hopper-kernels")
    paths = [str(Path(hgrn2.__file__).parents[1]), str(Path(__file__).parents[2])]
    # another process: this one may have imported Triton's interpreter
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.hopper", str(folder)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_kernels_compile(found):
    problems = [f"{r['kernel']}, {r['case']}: {r['problem']}" for r in found["results"] if r["problem"]]
    assert not problems, "\n".join(problems)


def test_every_kernel_is_compiled(found):
    assert set(found["kernels"]) == {result["kernel"] for result in found["results"]}


def test_programs_fit_shared_memory(found):
    assert max(result["shared"] for result in found["results"]) <= MOST_SHARED
