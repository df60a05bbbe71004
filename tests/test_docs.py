"""Examples of the documentation run, and their claims hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re

import pytest
import torch

import hgrn2
from tests.guides import ROOT, SETUPS, python_blocks, run_blocks, unmarked_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(hgrn2.__path__, "hgrn2.")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("triton", "lm_eval", "timm"):
            raise
        pytest.skip(f"{missing.name} is not installed, which this module is for")
    assert doctest.testmod(module).failed == 0


def test_the_readme_s_python_runs_and_its_loop_is_the_scan():
    names = run_blocks(ROOT / "README.md")
    torch.manual_seed(0)
    q, z, v = torch.randn(3, 70, 16, dtype=torch.float64).unbind(0)
    beta, state = torch.rand(16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    ys, end = names["loop"](q, z, v, beta, state)
    y, final = hgrn2.ops.hgrn2_scan(*(x[None, :, None] for x in (q, z, v)), beta[None], initial_state=state[None, None])
    torch.testing.assert_close(y[0, :, 0], ys)
    torch.testing.assert_close(final[0, 0], end)


# tests that run a page's blocks and look at what comes out
OWN_TESTS = {"README.md": "test_docs.py", "huggingface.md": "hf/test_guide.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [page for page in PAGES if python_blocks(page) and page.name not in OWN_TESTS], ids=lambda p: p.name
)
def test_a_page_s_python_runs_as_printed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SETUPS.get(path.name, lambda _: None)(monkeypatch)
    run_blocks(path)


def test_every_page_s_python_is_run():
    for page, file in OWN_TESTS.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert page in text
        assert "run_blocks(" in text
    for page in PAGES:
        # what converts GGUF files needs a package that is not among those of the tests
        assert [block for block in unmarked_python(page) if "GgufConfig" not in block] == [], page


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_demo_s_settings_exist():
    import tomllib

    from hgrn2.cli.model_config import model_config
    from hgrn2.data.settings import data_settings
    from hgrn2.train.settings import RunSettings

    settings = tomllib.loads((ROOT / "examples" / "demo.toml").read_text(encoding="utf-8"))
    assert RunSettings.from_flat(settings["train"]).train.max_time_s == 300
    found = data_settings(settings["data"])
    assert (found["data"], found["validation"]) == (["stdlib"], ["stdlib-validation"])
    # held-out text of the standard library says nothing of a model of something else
    assert data_settings(settings["data"], data=["notes"])["validation"] == []
    assert data_settings(settings["data"], data=["notes"], validation=["others"])["validation"] == ["others"]
    # the beginning that the Makefile gives is the one that the samples on the way continue
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    prompt = makefile.split("define DEMO_PROMPT\n")[1].split("\nendef")[0]
    assert settings["train"]["sample_prompt"] == prompt
    assert model_config(None, settings["model"], (), 4096).vocab_size == 4096
