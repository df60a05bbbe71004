from __future__ import annotations

import os
import sys
from pathlib import Path

# as the command does; OpenMP reads it once, when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# helpers of the tests are imported as tests.<name>, from wherever pytest was called
sys.path.insert(0, str(Path(__file__).parent.parent))

# without a GPU Triton's interpreter runs the kernels; this is read when Triton and the operators are first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# compiled kernels are tested without: hidden waits and times are looked for there
if not torch.cuda.is_available():
    try:
        from tests import axes
    except ModuleNotFoundError:  # jaxtyping is an extra
        pass
    else:
        axes.install()

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # tests of the kernels need nothing but pytest
    pass
else:
    # an example that takes long on a busy machine is no fault
    settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("unhurried")

from tests.shards import add_options, run_in_shards

# packages of the extras, by the names they are imported by; tests that need one are skipped without it
EXTRAS = {
    "PIL", "accelerate", "datasets", "docstring_parser", "fastapi", "fla", "httpx2", "hypothesis", "jinja2", "lm_eval",
    "matplotlib", "numpy", "onnx", "onnxruntime", "openai", "peft", "prometheus_client", "pyarrow", "pydantic", "rich",
    "safetensors", "starlette", "tensorboard", "tokenizers", "transformers", "triton", "trl", "tyro", "uvicorn",
    "yaml", "zstandard",
}  # fmt: skip


def pytest_addoption(parser, pluginmanager):
    add_options(parser)
    if not pluginmanager.has_plugin("timeout"):
        # pyproject.toml sets it, and an unknown setting is an error
        parser.addini("timeout", "ignored, as pytest-timeout is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    return run_in_shards(session)


class _Module(pytest.Module):
    """A test file; skipped if it imports a package of an extra that is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = error.__cause__
            if isinstance(missing, ImportError) and (missing.name or "").partition(".")[0] in EXTRAS:
                # a package that lacks a name is of a version that the extra excludes
                reason = "not installed" if isinstance(missing, ModuleNotFoundError) else "too old"
                pytest.skip(f"{missing.name} is {reason}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return _Module.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors: a second thread adds only its own cost, and on a busy machine many times that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_auto_classes():
    """Transformers imports fla by itself where it is installed, which then answers for our model type."""
    if "fla" in sys.modules and "hgrn2.hf" in sys.modules:
        sys.modules["hgrn2.hf"].register()


@pytest.fixture
def nan_filled_memory():
    """Fresh memory holds NaN (integers: the largest value), so that reading it before writing shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
