"""The benchmarks' parts, at sizes that take no time: what is wrong is not timed, what is timed is reported."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("exact", "report", "rivals", "scan", "scan_cuda")


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules by name, forgotten afterwards: their names are nobody's own."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_what_is_wrong_is_not_timed(modules, tmp_path, capsys):
    exact, scan = modules["exact"], modules["scan"]
    inputs = exact.make_inputs(1, 64, 2, 8, 4, "cpu")
    dy = torch.randn_like(inputs.v)
    bench = scan.Bench()
    with torch.no_grad():
        wanted = exact.exact(inputs, None)
    limit = exact.LIMITS[torch.float32]
    assert bench.add("right", exact.without_gradients(exact.scan, inputs), wanted, limit)
    assert bench.add("gradients", exact.with_backward(exact.scan, inputs, dy), exact.exact(inputs, dy), limit)
    assert not bench.add("wrong", lambda: 1.01 * exact.scan(*inputs), wanted, limit)
    bench.add_rival("absent", lambda: importlib.import_module("a_package_nobody_has").scan, wanted)
    rows = {row.name: row for row in bench.rows(2, "cpu")}
    assert rows["right"].value > 0
    assert rows["wrong"].value is None
    assert "wrong: relative error" in rows["wrong"].note
    assert "does not run here: ModuleNotFoundError" in rows["absent"].note
    modules["report"].report("scan", {"B": 1}, list(rows.values()), "cpu", tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(rows)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record


def test_a_part_of_a_large_result_is_checked(modules, monkeypatch):
    exact, scan_cuda = modules["exact"], modules["scan_cuda"]
    monkeypatch.setattr(scan_cuda, "CHECKED_TOKENS", 70)
    shape = scan_cuda.Shape(2, 150, 3, 16)
    inputs = exact.make_inputs(*shape, shape.width, "cpu", torch.bfloat16)
    checked = scan_cuda.Checked(inputs, torch.randn_like(inputs.v))
    limit = exact.LIMITS[torch.bfloat16]
    assert checked.error(exact.scan, inputs) <= limit
    assert checked.error(exact.loop, inputs) <= limit

    def other_gates(q, f, v, lower_bound):
        return exact.scan(q, f + 0.1, v, lower_bound)

    assert checked.error(other_gates, inputs) > limit


def test_why_a_rival_is_missing(modules):
    functions, rows = modules["scan_cuda"].operators()
    if len(functions) == 1:
        assert "does not run here" in rows[0].note
