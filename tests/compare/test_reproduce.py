"""The experiments of docs/reproduce: their files are valid, and the page follows from the results."""

from __future__ import annotations

import gzip
import importlib.util
import sys

import pytest

from hgrn2.compare.config import Comparison
from hgrn2.compare.matching import count_parameters
from hgrn2.compare.packed import PACKED_NAME, PackedResults
from hgrn2.compare.plan import _check_task, _model_configs
from tests.compare.test_reports import of_widths
from tests.guides import ROOT

FOLDER = ROOT / "docs" / "reproduce"
FILES = sorted(FOLDER.glob("*.toml"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"reproduce_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def redraw():
    return load("redraw")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_can_be_planned(path, redraw):
    assert path.stem in redraw.EXPERIMENTS
    comparison = Comparison.read(path)
    for task in comparison.tasks[:1]:
        settings = _check_task(comparison, task)
        vocab_size = {"language": 50257, "ablations": 4096}.get(path.stem)
        of_task = {"vocab_size": vocab_size} if vocab_size else settings.task.model_settings(settings.options)
        configs = _model_configs(comparison, task, settings, of_task)
        sizes = [count_parameters(settings.task, settings.options, config) for config in configs.values()]
        assert len(sizes) == len(comparison.models)
        if comparison.match == "first":
            assert max(sizes) < 1.02 * sizes[0]
            assert min(sizes) > 0.98 * sizes[0]
    if path.stem == "language":
        assert 44e6 < sizes[0] < 45e6
        assert len(comparison.models) == 9
        assert all(dict(comparison.train or {})["max_tokens"] >= 150e6 for _ in comparison.models)


def test_the_page_is_that_of_the_committed_results(redraw):
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    drawn = redraw.draw(FOLDER / "results")
    assert redraw.filled(page, drawn.blocks) == page, "run docs/reproduce/redraw.py"
    for name, content in drawn.files.items():
        if not name.endswith(".png"):
            assert (FOLDER / name).read_bytes() == content, name
        assert (FOLDER / name).is_file()


def test_results_fill_the_page(redraw, tmp_path):
    ended = of_widths(tmp_path)
    PackedResults(ended.results.out, ended.results.plan)
    results = tmp_path / "results"
    results.mkdir()
    (results / "mqar-1.jsonl.gz").write_bytes(gzip.compress((ended.results.out / PACKED_NAME).read_bytes()))
    drawn = redraw.draw(results)
    assert drawn.blocks["language"] == redraw.NOT_RUN
    assert "hgrn2-16" in drawn.blocks["mqar"]
    # the invented comparison has no hgrn1
    assert drawn.blocks["mqar-claim"] == redraw.NOT_RUN
    assert {"plots/mqar.width.png", "tables/mqar.md", "tables/mqar.csv"} <= set(drawn.files)
    assert "](../plots/mqar.width.png)" in drawn.files["tables/mqar.md"].decode()
    page = redraw.filled(
        "a <!-- mqar-claim -->before<!-- end -->\n<!-- mqar -->\n\nbefore\n\n<!-- end -->\n", drawn.blocks
    )
    assert page.startswith(f"a <!-- mqar-claim -->{redraw.NOT_RUN}<!-- end -->\n<!-- mqar -->\n\n4 models")
    assert "before" not in page


def test_articles_become_documents(tmp_path):
    import lzma

    prepare = load("prepare")
    source = tmp_path / "train_0.txt.xz"
    source.write_bytes(lzma.compress(b"First.\n\fSecond,\nof two lines.\f \f"))
    prepare.write_articles(source, tmp_path / "out" / "train_0.jsonl")
    lines = (tmp_path / "out" / "train_0.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"text": "First."}', '{"text": "Second,\\nof two lines."}']
