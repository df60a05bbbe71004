"""Results of a comparison in one file: written as runs end, united and continued elsewhere."""

from __future__ import annotations

import gzip
import json

import pytest

from hgrn2 import cli
from hgrn2.compare.comparison import compare, merge
from hgrn2.compare.outcome import Outcome
from hgrn2.compare.packed import PACKED_NAME, PackedResults
from hgrn2.compare.plan import Plan
from hgrn2.compare.results import results_csv
from hgrn2.train.metrics import read_metrics
from tests.compare.test_side_by_side import Quiet
from tests.compare.tiny import MQAR, comparison, invent
from tests.refusals import refuses

FIRST, SECOND = (f"mqar.{model}.lr0.01.seed0" for model in ("hgrn2", "attention"))


def packed(out, values):
    """Write the results of a comparison whose runs reached these accuracies; runs without a value have not ended."""
    wanted = comparison()
    plan = invent(out, wanted, {FIRST: 0.5, SECOND: 0.5} | values)
    for run in plan.runs:
        if run.folder not in values:
            Outcome("failed", "cut off").save(out / "runs" / run.folder)
    PackedResults(out, plan)
    return out / PACKED_NAME


def test_files_of_two_machines_become_one_comparison(tmp_path):
    one, two = packed(tmp_path / "one", {FIRST: 0.25}), packed(tmp_path / "two", {SECOND: None})
    compressed = tmp_path / "two.jsonl.gz"
    compressed.write_bytes(gzip.compress(two.read_bytes()))
    ended = merge([one, compressed], tmp_path / "both")
    assert {run.planned.folder: run.state for run in ended.results.runs} == {FIRST: "finished", SECOND: "diverged"}
    (found,) = ended.results.in_state("finished")
    assert found.value == 0.25
    assert read_metrics(tmp_path / "both" / "runs" / FIRST) == read_metrics(tmp_path / "one" / "runs" / FIRST)
    # the united folder has results to pass on, and more can be added to it
    again = merge([tmp_path / "both" / PACKED_NAME], tmp_path / "copy")
    assert results_csv(again.results) == results_csv(ended.results)
    assert ended.files[0].read_text() != ""


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = packed(tmp_path / "one", {FIRST: 0.25, SECOND: 0.5})
    path.write_bytes(path.read_bytes()[:-20])
    ended = merge([path], tmp_path / "both")
    assert [run.state for run in ended.results.runs] == ["finished", "waiting"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    one = packed(tmp_path / "one", {FIRST: 0.25})
    other = tmp_path / "other"
    plan = invent(other, comparison(tasks={"mqar": {**MQAR, "num_pairs": 3}}), {FIRST: 0.5, SECOND: 0.5})
    PackedResults(other, plan)
    with refuses("contradiction", "num_pairs", "2", "3"):
        merge([one, other / PACKED_NAME], tmp_path / "both")
    with refuses("contradiction", "num_pairs", "2", "3"):
        merge([one], other)
    with refuses("not-found", "nothing.jsonl"):
        merge([tmp_path / "nothing.jsonl"], tmp_path / "both")
    (tmp_path / "text").write_text('{"kind": "start"}\n')
    with refuses("version", "text"):
        merge([tmp_path / "text"], tmp_path / "both")
    (tmp_path / "text").write_text("words\n")
    with refuses("damaged", "text", "line 1"):
        merge([tmp_path / "text"], tmp_path / "both")
    lines = one.read_text().splitlines()
    (tmp_path / "text").write_text("\n".join([lines[0], json.dumps({"folder": FIRST}), ""]))
    with refuses("damaged", "text", "line 2"):
        merge([tmp_path / "text"], tmp_path / "both")
    assert not (tmp_path / "both" / "runs" / FIRST / "outcome.json").exists()


@pytest.mark.slow
def test_a_comparison_goes_on_with_results_of_another_machine(tmp_path):
    out, wanted = tmp_path / "here", comparison()
    one = packed(tmp_path / "there", {FIRST: 0.25})
    display = Quiet()
    ended = compare(wanted, out, 1, display, results=[one], only=["mqar.*"])
    assert [folder for folder, _ in display.ends] == [SECOND]
    assert len(ended.results.in_state("finished")) == 2
    # written as they come: the plan, the run of the other machine, and the new one
    names = [json.loads(line).get("folder") for line in (out / PACKED_NAME).read_text().splitlines()]
    assert names == [None, FIRST, SECOND]
    assert merge([out / PACKED_NAME], tmp_path / "copy").results.in_state("waiting") == []


@pytest.mark.slow
def test_patterns_choose_what_is_trained(tmp_path):
    ended = compare(comparison(), tmp_path / "out", 1, Quiet(), only=["mqar.att*"])
    assert {run.planned.folder: run.state for run in ended.results.runs} == {FIRST: "waiting", SECOND: "finished"}
    with refuses("unknown-name", "--only", "text.*", FIRST):
        compare(comparison(), tmp_path / "out", 1, Quiet(), only=["text.*"])


@pytest.mark.slow
def test_after_a_while_no_run_is_started(tmp_path):
    display = Quiet()
    ended = compare(comparison(), tmp_path / "out", 1, display, start_for_s=1e-9)
    assert display.ends == []
    assert ended.stopped_by is None
    assert len(ended.results.in_state("waiting")) == 2
    # the first has begun by then, and comes to its end
    ended = compare(comparison(), tmp_path / "out", 1, display, start_for_s=0.3)
    assert [run.state for run in ended.results.runs] == ["finished", "waiting"]


def test_the_command_unites_files(tmp_path, capsys):
    one, two = packed(tmp_path / "one", {FIRST: 0.25}), packed(tmp_path / "two", {SECOND: 0.5})
    out = tmp_path / "both"
    assert cli.main(["compare", "--merge", str(one), str(two), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report   {out / 'report.html'}"
    assert len(Plan.load(out).runs) == 2
    assert cli.main(["compare", "--merge", str(one)]) != 0
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["mqar"], ["mqar", "[tasks.mqar]"]),
        (["mamba"], ["mamba", "[models.mamba]"]),
        (["compares.toml"], ["compares.toml", "compare.toml"]),
        (["hgrn2", "attention"], ["attention", "[models.NAME]"]),
        (["--seeds", "3"], ["--seeds", "the file"]),
        (["--jobs", "2", "--runs-per-process", "99"], ["--runs-per-process", "99", "16"]),
    ],
)
def test_what_belongs_into_the_file_is_said_so(words, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare.toml").write_text("")
    assert cli.main(["compare", *words]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    for name in names:
        assert name in line
