"""Sizes are matched, every model gets the same data, and mistakes are found before anything is trained."""

from __future__ import annotations

import json

import pytest

from hgrn2.compare.comparison import compare, report
from hgrn2.compare.config import Comparison
from hgrn2.compare.files import repeat_command, write_repeat_files
from hgrn2.compare.matching import count_parameters, match_size
from hgrn2.compare.plan import Plan, check_extends, make_plan
from hgrn2.compare.report.curves import rate_curves
from hgrn2.compare.report.tables import ranking
from hgrn2.models import HGRN2Config
from hgrn2.storage.lock import run_lock
from hgrn2.tasks import find_task
from tests.compare.tiny import MODEL, MODELS, MQAR, comparison, invent
from tests.refusals import refuses

TASK = find_task("mqar")
TEXT = {"task": "language", "max_steps": 3}
OPTIONS = TASK.Options(length=16, num_pairs=2, vocab_size=16)


def test_sizes_are_matched_by_the_channel_mixer():
    base = HGRN2Config.from_dict({**MODEL, "vocab_size": 16, "intermediate_size": 200})
    wanted = count_parameters(TASK, OPTIONS, base)
    for changes in ({"layers": "attention", "mixers": {"attention": {"num_heads": 2}}}, {"use_short_conv": True}, {}):
        found = match_size("x", TASK, OPTIONS, base.replace(intermediate_size=24, **changes), wanted)
        assert abs(count_parameters(TASK, OPTIONS, found) / wanted - 1) < 0.02
        assert changes == {} or found.intermediate_size != 24


def test_a_size_out_of_reach_names_the_nearest():
    config = HGRN2Config.from_dict({**MODEL, "vocab_size": 16})
    nearest = count_parameters(TASK, OPTIONS, config.replace(intermediate_size=1))
    with refuses("contradiction", "models.small", "100 parameters", f"{nearest:,}", "intermediate_size = 1"):
        match_size("small", TASK, OPTIONS, config, 100)
    with refuses("contradiction", "models.large", f"{10**12:,} parameters", "intermediate_size"):
        match_size("large", TASK, OPTIONS, config, 10**12)


def test_runs_differ_only_in_what_is_compared(tmp_path):
    plan = make_plan(comparison(seeds=[0, 7], learning_rates=[1e-3, 1e-2]), tmp_path)
    assert len(plan.runs) == len({run.folder for run in plan.runs}) == 8
    assert {json.dumps({**r.settings, "seed": 0, "learning_rate": 0}) for r in plan.runs} == {
        json.dumps({**plan.runs[0].settings, "seed": 0, "learning_rate": 0})
    }
    assert {(r.model, r.settings["seed"], r.settings["learning_rate"]) for r in plan.runs} == {
        (m, s, lr) for m in ("hgrn2", "attention") for s in (0, 7) for lr in (1e-3, 1e-2)
    }
    sizes = {count_parameters(TASK, OPTIONS, HGRN2Config.from_dict(run.model_config)) for run in plan.runs}
    assert max(sizes) / min(sizes) < 1.02
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


def test_a_number_of_parameters_and_no_matching(tmp_path):
    sizes = [
        [count_parameters(TASK, OPTIONS, HGRN2Config.from_dict(run.model_config)) for run in plan.runs]
        for plan in (make_plan(comparison(match=match), tmp_path) for match in (8000, "none"))
    ]
    assert all(abs(size / 8000 - 1) < 0.02 for size in sizes[0])
    assert sizes[1][0] != sizes[1][1]


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"tasks": {"mqar": {**MQAR, "num_pairs": 5}}}, "contradiction", ["tasks.mqar", "num_pairs", 5]),
        ({"tasks": {"mqar": {**MQAR, "max_steps": 0}}}, "invalid-value", ["tasks.mqar", "max_steps"]),
        ({"tasks": {"mqar": {k: v for k, v in MQAR.items() if k != "max_steps"}}}, "incomplete", ["max_steps"]),
        ({"model": {**MODEL, "vocab_size": 8}}, "contradiction", ["models.hgrn2", "vocab_size = 8", 16, "tasks.mqar"]),
        ({"model": {**MODEL, "hidden_size": 15}}, "contradiction", ["models.hgrn2", "hidden_size"]),
        ({"models": {**MODELS, "attention": {}}}, "incomplete", ["models.attention", "num_heads"]),
        ({"models": {"a": {"layers": "hgrn3"}}}, "unknown-name", ["models.a", "'hgrn3'", "'hgrn2'"]),
        ({"models": {"hgrn2": {}, "b": {"intermediate_size": 9}}}, "contradiction", ["models.b", "intermediate_size"]),
        ({"match": 100}, "contradiction", ["models.hgrn2", "100"]),
        ({"tasks": {"t": {**TEXT, "data": {"tokeniser": "x"}}}}, "invalid-value", ["tokeniser", "tokenizer"]),
    ],
)  # fmt: skip
def test_mistakes_end_before_training(tmp_path, changes, code, names):
    with refuses(code, *names):
        compare(comparison(**changes), tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.json").exists()
    assert not list(tmp_path.glob("out/runs/*"))


def test_a_mixer_that_cannot_pack_is_refused_for_text(tmp_path, monkeypatch):
    from hgrn2.nn.mixers.attention import Attention

    monkeypatch.setattr(Attention, "can_pack", False)
    with refuses("unsupported", "models.attention", "'attention'", "tasks.text"):
        make_plan(comparison(tasks={"text": TEXT}), tmp_path)


def test_a_comparison_may_only_be_added_to(tmp_path):
    old = make_plan(comparison(), tmp_path)
    check_extends(old, make_plan(comparison(seeds=[0, 1], learning_rates=[1e-2, 1e-3]), tmp_path), tmp_path)
    with refuses("contradiction", "seed0"):
        check_extends(old, make_plan(comparison(seeds=[1]), tmp_path), tmp_path)
    with refuses("contradiction", "attention"):
        check_extends(old, make_plan(comparison(models={"hgrn2": {}}), tmp_path), tmp_path)
    changed = make_plan(comparison(tasks={"mqar": {**MQAR, "max_steps": 7}}), tmp_path)
    with refuses("contradiction", "max_steps 6", 7):
        check_extends(old, changed, tmp_path)
    wider = make_plan(comparison(model={**MODEL, "hidden_size": 32}), tmp_path)
    with refuses("contradiction", "hidden_size 16", 32):
        check_extends(old, wider, tmp_path)


def test_plans_that_cannot_be_read(tmp_path):
    with refuses("not-found", tmp_path):
        Plan.load(tmp_path)
    plan = make_plan(comparison(), tmp_path)
    plan.save(tmp_path)
    path = tmp_path / "comparison.json"
    text = path.read_text()
    path.write_text(text.replace('"max_steps": 6', '"max_steps": 8'))
    with refuses("damaged", path):
        Plan.load(tmp_path)
    path.write_text("{")
    with refuses("unreadable", path):
        Plan.load(tmp_path)


def test_a_folder_that_is_taken(tmp_path):
    with run_lock(tmp_path / "busy"), refuses("in-use", tmp_path / "busy"):
        compare(comparison(), tmp_path / "busy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with refuses("already-exists", "notes.txt"):
        compare(comparison(), tmp_path / "other")
    (tmp_path / "file").write_text("")
    with refuses("unwritable", tmp_path / "file"):
        compare(comparison(), tmp_path / "file")


def test_muon_s_learning_rate_is_an_axis_of_the_grid(tmp_path):
    wanted = comparison(
        models={"hgrn2": {}}, muon_learning_rates=[0.01, 0.02], learning_rates=[1e-3, 1e-2],
        tasks={"plain": {**MQAR, "task": "mqar"}, "muon": {**MQAR, "task": "mqar", "optimizer": "muon"}},
    )  # fmt: skip
    assert Comparison.from_tables(wanted.to_tables()) == wanted
    plan = make_plan(wanted, tmp_path)
    assert wanted.num_runs == len(plan.runs) == 2 + 4
    found = {run.folder: run.run_settings.train for run in plan.runs}
    assert list(found)[:2] == ["plain.hgrn2.lr0.001.seed0", "plain.hgrn2.lr0.01.seed0"]
    train = found["muon.hgrn2.lr0.001.muon0.02.seed0"]
    assert (train.learning_rate, train.muon_learning_rate) == (1e-3, 0.02)
    with refuses("contradiction", "muon_learning_rates", "optimizer"):
        comparison(muon_learning_rates=[0.01])


def test_the_report_shows_both_rates(tmp_path):
    rates, muon = [1e-3, 1e-2], [0.01, 0.02, 0.04]
    wanted = comparison(
        models={"hgrn2": {}}, learning_rates=rates, muon_learning_rates=muon, train={"optimizer": "muon"}
    )
    values = {f"mqar.hgrn2.lr{r:g}.muon{m:g}.seed0": 0.1 + 10 * m + 5 * r for r in rates for m in muon}
    plan = invent(tmp_path / "out", wanted, values)
    ended = report(tmp_path / "out")
    (task,) = ended.results.tasks
    (cell,) = task.cells
    assert (cell.best.learning_rate, cell.best.muon_learning_rate, cell.is_at_edge) == (1e-2, 0.04, True)
    assert ranking(task).rows[0][2] == "0.01, Muon 0.04 (edge)"
    (by_muon,) = rate_curves(task, "muon_learning_rate")
    assert (by_muon.x, by_muon.y) == (muon, pytest.approx([0.1 + 10 * m + 0.05 for m in muon]))
    (by_rate,) = rate_curves(task)
    assert (by_rate.x, by_rate.y) == (rates, pytest.approx([0.1 + 0.4 + 5 * r for r in rates]))
    assert repeat_command(tmp_path / "out", plan.runs[-1]).endswith(" --muon-learning-rate 0.04")
    write_repeat_files(tmp_path / "out", plan)
    assert "muon_learning_rate" not in (tmp_path / "out" / "repeat" / "mqar.toml").read_text()
