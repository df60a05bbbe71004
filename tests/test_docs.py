"""What the documentation shows runs and is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import hgrn2

ROOT = Path(__file__).resolve().parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(hgrn2.__path__, "hgrn2.")]


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("triton", "lm_eval"):
            raise
        pytest.skip(f"{missing.name} is not installed, which this module is for")
    assert doctest.testmod(module).failed == 0


def test_the_readme_s_python_runs_and_its_loop_is_the_scan():
    blocks = python_blocks(ROOT / "README.md")
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    torch.manual_seed(0)
    q, z, v = torch.randn(3, 70, 16, dtype=torch.float64).unbind(0)
    beta, state = torch.rand(16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    ys, end = names["loop"](q, z, v, beta, state)
    y, final = hgrn2.ops.hgrn2_scan(*(x[None, :, None] for x in (q, z, v)), beta[None], initial_state=state[None, None])
    torch.testing.assert_close(y[0, :, 0], ys)
    torch.testing.assert_close(final[0, 0], end)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_demo_s_settings_exist():
    import tomllib

    from hgrn2.settings import data_settings, model_config
    from hgrn2.train.config import TrainConfig

    settings = tomllib.loads((ROOT / "examples" / "demo.toml").read_text(encoding="utf-8"))
    assert TrainConfig.from_dict(settings["train"]).max_time_s == 300
    assert data_settings(settings["data"])["data"] == ["stdlib"]
    assert model_config(None, settings["model"], (), 4096).vocab_size == 4096
