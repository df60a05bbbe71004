"""The reports of a comparison: their numbers are those of the runs, and the page is whole, small and needs nothing."""

from __future__ import annotations

import csv
import io
import re
from statistics import stdev

import pytest

from hgrn2.compare.comparison import report
from hgrn2.compare.files import repeat_command
from hgrn2.compare.report.curves import across_tasks, loss_curves, metric_curves, option_curves, width_curves
from hgrn2.compare.report.recommendation import leaders_of, recommendation
from hgrn2.compare.report.tables import overview, ranking
from hgrn2.compare.results import Results
from tests.compare.tiny import MQAR, comparison, invent
from tests.pages import Page, check_headings, check_pictures, check_self_contained
from tests.refusals import refuses

# accuracies by run; None diverged
VALUES = {
    "mqar.hgrn2.lr0.001.seed0": 0.5,
    "mqar.hgrn2.lr0.001.seed1": 0.6,
    "mqar.hgrn2.lr0.01.seed0": 0.9,
    "mqar.hgrn2.lr0.01.seed1": None,
    "mqar.attention.lr0.001.seed0": 0.7,
    "mqar.attention.lr0.001.seed1": 0.9,
    "mqar.attention.lr0.01.seed0": 0.2,
    "mqar.attention.lr0.01.seed1": 0.3,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparisons") / "a <comparison>"
    invent(out, comparison(seeds=[0, 1], learning_rates=[1e-2, 1e-3]), VALUES)
    report(out)
    return out


@pytest.fixture(scope="module")
def text(out):
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_well_formed_small_and_self_contained(page, text):
    check_headings(page, text, least=5)
    # losses, accuracy against learning rate, accuracy against length
    check_pictures(page, 4)
    check_self_contained(page, text)
    assert "loss <b>not</b> finite" in page.text()
    assert "a <comparison>" in page.text()


def test_the_best_learning_rate_has_the_best_mean_of_the_most_seeds(out):
    (task,) = Results.read(out).tasks
    assert [cell.model for cell in task.cells] == ["attention", "hgrn2"]
    attention, hgrn2 = task.cells
    assert attention.best.learning_rate == 1e-3
    assert attention.best.mean == pytest.approx(0.8)
    assert attention.best.deviation == pytest.approx(stdev([0.7, 0.9]))
    # 0.9 with one of two seeds diverged does not stand beside 0.55 of two
    assert hgrn2.best.learning_rate == 1e-3
    assert hgrn2.best.mean == pytest.approx(0.55)
    # of two rates, each is at an edge
    assert not hgrn2.is_at_edge


def test_the_best_of_three_rates_at_their_edge_is_marked(tmp_path):
    accuracies = {1e-3: 0.5, 1e-2: 0.7, 1e-1: 0.9}
    values = {f"mqar.hgrn2.lr{rate:g}.seed0": value for rate, value in accuracies.items()}
    values |= {f"mqar.attention.lr{rate:g}.seed0": 1 - abs(0.7 - value) for rate, value in accuracies.items()}
    invent(tmp_path / "out", comparison(learning_rates=list(accuracies)), values)
    (task,) = Results.read(tmp_path / "out").tasks
    assert {cell.model: (cell.best.learning_rate, cell.is_at_edge) for cell in task.cells} == {
        "hgrn2": (1e-1, True),
        "attention": (1e-2, False),
    }
    assert "0.1 (edge)" in str(ranking(task).rows)


def test_the_numbers_are_those_of_the_runs(page, out):
    shown = page.text()
    for wanted in ("80.00% ± 14.14% (n = 2)", "55.00% ± 7.07% (n = 2)", "70.00% to 90.00%", "3 of 4, 1 diverged",
                   "higher is better", "640", "100 MB", "90.00% (n = 1), 1 diverged",
                   "8 runs, 7 finished, 1 diverged", f"hgrn2 compare --report-only '{out}'"):  # fmt: skip
        assert wanted in shown, wanted
    rows = [re.sub(r"\s+", " ", data) for tag, data in page.texts if tag == "th"]
    assert rows.index("attention") < rows.index("hgrn2")


def test_markdown_and_csv_say_the_same(out):
    written = (out / "report.md").read_text(encoding="utf-8")
    assert "| attention | 80.00% ± 14.14% (n = 2) |" in written
    assert written.startswith("# hgrn2 and attention on mqar\n")
    for name in re.findall(r"!\[.*\]\((.*)\)", written):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text(encoding="utf-8"))))
    assert {line["folder"].removeprefix("runs/") for line in lines} == set(VALUES)
    for line in lines:
        value = VALUES[line["folder"].removeprefix("runs/")]
        assert line["state"] == ("diverged" if value is None else "finished")
        assert line["metric_value"] == ("" if value is None else str(value))
        assert line["val_exact"] == ("" if value is None else str(value / 2))
        assert int(line["parameters"]) > 1000


def test_curves_are_means_over_seeds(out):
    (task,) = Results.read(out).tasks
    by_tokens = {curve.model: curve for curve in loss_curves(task, "tokens")}
    by_time = {curve.model: curve for curve in loss_curves(task, "elapsed_s")}
    assert by_tokens["attention"].x[0] == 64
    assert by_tokens["attention"].x[-1] == 64 * 40
    assert by_time["attention"].x[-1] == pytest.approx(4.0)
    # the invented losses differ by the accuracies
    for one, other in zip(by_tokens["attention"].y, by_tokens["hgrn2"].y, strict=True):
        assert one - other == pytest.approx(0.8 - 0.55)
    (length,) = option_curves(task).values()
    found = {curve.model: (curve.x, curve.y) for curve in length}
    assert found["attention"] == ([32, 64], pytest.approx([0.4, 0.2]))


def test_tasks_of_one_kind_are_drawn_against_the_option_in_which_they_differ(tmp_path):
    sizes = {"short": (16, 2), "long": (64, 4), "middle": (32, 3)}
    tasks = {n: {**MQAR, "task": "mqar", "length": length, "num_pairs": pairs} for n, (length, pairs) in sizes.items()}
    tasks["other"] = {"task": "copying", "max_steps": 3}
    wanted = comparison(tasks=tasks)
    values = {
        f"{task}.{model}.lr0.01.seed0": 1 / (sizes.get(task, (8, 1))[0] * (1 + (model == "attention")))
        for task in tasks
        for model in ("hgrn2", "attention")
    }
    invent(tmp_path / "out", wanted, values)
    ended = report(tmp_path / "out")
    (series,) = across_tasks(ended.results)
    assert (series.option, series.further) == ("length", ("num_pairs",))
    assert [task.name for task in series.tasks] == ["short", "middle", "long"]
    assert {curve.model: (curve.x, curve.y) for curve in series.curves} == {
        "hgrn2": ([16, 32, 64], [1 / 16, 1 / 32, 1 / 64]),
        "attention": ([16, 32, 64], [1 / 32, 1 / 64, 1 / 128]),
    }
    assert [row[0] for row in overview(ended.results).rows] == ["hgrn2", "attention"]
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert ("h3", "Accuracy against length") in page.texts
    assert "length (with it num pairs)" in page.text()
    assert "All tasks" in page.text()


def of_widths(tmp_path, seeds=(0,), values=None):
    """A comparison of two mixers at two widths; the accuracy follows from the width."""
    models = {
        f"{name}-{width}": {"layers": name, "hidden_size": width, **more}
        for width in (8, 16)
        for name, more in (("hgrn2", {}), ("attention", {"mixers": {"attention": {"num_heads": 1}}}))
    }
    wanted = comparison(models=models, match="none", seeds=list(seeds))
    found = {
        f"mqar.{name}-{width}.lr0.01.seed{seed}": (values or (lambda n, w, s: w / (20 if n == "hgrn2" else 40)))(
            name, width, seed
        )
        for name in ("hgrn2", "attention")
        for width in (8, 16)
        for seed in seeds
    }
    invent(tmp_path / "out", wanted, found)
    return report(tmp_path / "out")


def test_models_named_by_their_width_are_drawn_against_it(tmp_path):
    ended = of_widths(tmp_path)
    (task,) = ended.results.tasks
    assert {curve.model: (curve.x, curve.y) for curve in width_curves(task)} == {
        "hgrn2": ([8, 16], [0.4, 0.8]),
        "attention": ([8, 16], [0.2, 0.4]),
    }
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("h1", "hgrn2 and attention on mqar") in Page(text).texts
    assert ("h2", "Against width") in Page(text).texts
    # one colour a mixer, one pattern a width; the widest is drawn through
    assert all(text.count(f'<i class="own {role}">') for role in ("m0", "m0 dashed", "m1", "m1 dashed"))
    assert (tmp_path / "out" / "plots" / "width.png").read_bytes().startswith(b"\x89PNG")
    assert "(plots/width.png)" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_the_accuracy_against_tokens_is_a_mean_over_seeds(out):
    (task,) = Results.read(out).tasks
    # the invented runs have one validation each
    assert metric_curves(task) == []
    for cell in task.cells:
        for run in cell.best.finished:
            last = run.facts.validation[-1]
            run.facts.validation.insert(0, {**last, "tokens": 64, "val_accuracy": last["val_accuracy"] / 2})
    found = {curve.model: (curve.x, curve.y) for curve in metric_curves(task)}
    assert found["attention"] == ([64, 2560], pytest.approx([0.4, 0.8]))


def test_nothing_is_recommended_from_one_seed(tmp_path):
    found = " ".join(recommendation(of_widths(tmp_path).results))
    assert "hgrn2-16 on mqar (80.00% (n = 1))" in found
    assert "No recommendation" in found


def test_a_model_is_recommended_where_the_spread_allows_it(tmp_path):
    clear = of_widths(tmp_path / "clear", (0, 1), lambda n, w, s: (0.9 if n == "hgrn2" else 0.5) - 0.01 * s - 1 / w)
    assert [cell.model for cell in leaders_of(clear.results.tasks[0])] == ["hgrn2-16"]
    assert "We recommend hgrn2-16 with a learning rate of 0.01" in " ".join(recommendation(clear.results))
    close = of_widths(tmp_path / "close", (0, 1), lambda n, w, s: 0.9 - 0.1 * s - (0.01 if n == "hgrn2" else 0) - 4 / w)
    assert [cell.model for cell in leaders_of(close.results.tasks[0])] == ["attention-16", "hgrn2-16"]
    found = " ".join(recommendation(close.results))
    # attention's cache grows
    assert "does not decide between attention-16 and hgrn2-16" in found
    assert "we recommend hgrn2-16" in found


def test_unfinished_runs_are_named_in_the_recommendation(tmp_path):
    of_widths(tmp_path, (0, 1))
    (tmp_path / "out" / "runs" / "mqar.hgrn2-16.lr0.01.seed0" / "outcome.json").unlink()
    found = recommendation(report(tmp_path / "out").results)
    assert "1 run of 4" not in found[0]
    assert found[0].startswith("1 run of 8")


def test_a_model_that_read_fewer_tokens_is_marked(tmp_path):
    plan = invent(tmp_path / "out", comparison(), {"mqar.hgrn2.lr0.01.seed0": 0.5, "mqar.attention.lr0.01.seed0": 0.4})
    path = tmp_path / "out" / "runs" / plan.runs[1].folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens": 2560', '"tokens": 2500'))
    (task,) = Results.read(tmp_path / "out").tasks
    table = ranking(task)
    at = table.head.index("tokens")
    assert [row[at] for row in table.rows] == ["2.56k", "2.5k (fewer)"]


def test_lower_is_better_for_a_loss(out, monkeypatch):
    from hgrn2.tasks import Metric, find_task

    monkeypatch.setattr(find_task("mqar"), "metric", Metric("val_loss"))
    (task,) = Results.read(out).tasks
    assert not task.metric.higher_is_better
    assert all(cell.best.mean == 1.0 for cell in task.cells)


def test_runs_that_have_not_ended_are_named_so(tmp_path):
    values = {f"mqar.{m}.lr0.01.seed{s}": 0.5 for m in ("hgrn2", "attention") for s in (0, 1)}
    plan = invent(tmp_path / "out", comparison(seeds=[0, 1]), values)
    runs = tmp_path / "out" / "runs"
    (runs / plan.runs[0].folder / "outcome.json").unlink()
    (runs / plan.runs[1].folder / "metrics.jsonl").write_text("damaged\n")
    for path in (runs / plan.runs[2].folder).iterdir():
        path.unlink()
    ended = report(tmp_path / "out")
    states = [run.state for run in ended.results.runs]
    assert states == ["unfinished", "failed", "waiting", "finished"]
    assert "metrics.jsonl" in ended.results.runs[1].reason
    shown = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text()
    assert "1 finished, 1 failed, 1 unfinished, 1 not begun" in shown


def test_a_report_of_nothing(tmp_path):
    plan = invent(tmp_path / "out", comparison(), {f"mqar.{m}.lr0.01.seed0": None for m in ("hgrn2", "attention")})
    report(tmp_path / "out")
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert repeat_command(tmp_path / "out", plan.runs[0]).startswith("hgrn2 train --config ")
    with refuses("not-found", tmp_path):
        report(tmp_path)
