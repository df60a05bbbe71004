"""Tests in several processes: each runs once, what fails is told, and a process that ends takes nothing with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tests.shards import add_options as pytest_addoption, run_in_shards as pytest_runtestloop
"""
TESTS = """
import os
import pytest

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return 1

@pytest.mark.parametrize("i", range(9))
def test_passes(i, shared):
    with open(os.environ["RAN"], "a") as file:
        file.write(f"{i}\\n")

def test_fails():
    assert 1 == 2, "one is not two"

def test_ends_the_process():
    os._exit(5)

@pytest.mark.skip(reason="left out")
def test_skipped():
    pass
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\nmarkers = large\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


def run(folder, *flags):
    command = [sys.executable, "-m", "pytest", "-q", *flags]
    environment = {"PATH": "", "RAN": str(folder / "ran")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_test_runs_once_and_is_reported(folder):
    done = run(folder, "--shards", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted((folder / "ran").read_text().split()) == [str(i) for i in range(9)]
    assert "2 failed, 9 passed, 1 skipped" in done.stdout
    assert "one is not two" in done.stdout
    assert "ended with status 5" in done.stdout
    # -ra
    assert "left out" in done.stdout


@pytest.mark.slow
def test_a_selection_and_the_first_failure(folder):
    done = run(folder, "--shards", "2", "-k", "passes or skipped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed, 1 skipped, 2 deselected" in done.stdout
    done = run(folder, "--shards", "2", "-x", "-k", "fails or skipped")
    assert done.returncode == 1
    assert "stopping after 1 failures" in done.stdout


# in place of torch: a GPU whose context can be lost
FAKE_TORCH = """
class cuda:
    lost = False
    is_available = is_initialized = staticmethod(lambda: True)
    memory_reserved = staticmethod(lambda: 1)
    empty_cache = staticmethod(lambda: None)

    @staticmethod
    def synchronize():
        if cuda.lost:
            raise RuntimeError("an illegal memory access was encountered")
"""
GPU_TESTS = """
import os
import time
import pytest
import torch

pytestmark = pytest.mark.gpu

def note(line):
    with open(os.environ["RAN"], "a") as file:
        file.write(line + "\\n")

@pytest.mark.large
@pytest.mark.parametrize("i", range(2))
def test_large(i):
    note("begin")
    time.sleep(0.3)
    note("end")

@pytest.mark.parametrize("i", range(20))
def test_passes(i):
    assert not torch.cuda.lost
    time.sleep(0.02)

def test_loses_the_context():
    torch.cuda.lost = True
    assert False, "as an illegal access shows"
"""


def test_gpu_tests_run_in_processes_by_themselves(folder):
    (folder / "torch.py").write_text(FAKE_TORCH)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\nmarkers =\n  large\n  gpu\n")
    # one of the large ones at the beginning of each of two processes
    for i in range(2):
        (folder / f"test_some_{i}.py").write_text(GPU_TESTS.replace("range(2)", f"[{i}]"))
    (folder / "test_some.py").unlink()
    done = run(folder, "-m", "gpu", "-v")
    assert done.returncode == 1, done.stdout + done.stderr
    # a process that lost its context ran no further test
    assert "2 failed, 42 passed" in done.stdout
    assert (folder / "ran").read_text().split() == ["begin", "end"] * 2


BLOCKER = """
import importlib.machinery
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {extras!r}:
            return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder()
"""


@pytest.mark.slow
def test_gpu_tests_are_collected_with_torch_and_pytest_alone(tmp_path):
    extras = {
        "accelerate", "datasets", "fla", "hypothesis", "jaxtyping", "lm_eval", "matplotlib", "numpy", "onnx", "peft",
        "pyarrow", "rich", "safetensors", "tokenizers", "transformers", "trl", "tyro", "xdist", "zstandard",
    }  # fmt: skip
    (tmp_path / "blocker.py").write_text(BLOCKER.format(extras=extras))
    absent = ("timeout", "hypothesispytest", "jaxtyping", "cacheprovider")
    plugins = ["-p", "blocker", *(word for name in absent for word in ("-p", f"no:{name}"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", *plugins, "tests"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        # the interpreter of Triton, which other tests use, needs NumPy
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")]), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/ops/test_gpu.py::test_matches_the_oracle" in done.stdout
    assert "numpy is not installed" in done.stdout
