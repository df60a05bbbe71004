"""The report of a task with an accuracy, and labels that stay on the page."""

from __future__ import annotations

import json

from hgrn2.train.metrics import write_records
from hgrn2.train.plots import loss_figure
from hgrn2.train.report.facts import RunFacts
from hgrn2.train.report.figures import metric_figure
from hgrn2.train.report.page import render


def facts(run_dir, *, task="parity", resumed_at=None):
    common = [{"step": step, "tokens": 100 * step, "elapsed_s": step / 10} for step in range(1, 41)]
    records = [{"kind": "start", "step": 0, "device": "cpu", "num_threads": 1, "torch": "2", "hgrn2": "0"}]
    for at in common:
        if at["step"] == resumed_at:
            records.append({**records[0], "step": resumed_at})
        records.append({"kind": "train", **at, "loss": 1 / at["step"], "tokens_per_s": 5.0})
        if at["step"] % 20 == 0:
            accuracy = at["step"] / 50
            figures = {"val_loss": 0.5, "val_accuracy": accuracy, "val_accuracy_length_128": accuracy / 2}
            records.append({"kind": "validation", **at, **figures})
    run_dir.mkdir()
    write_records(run_dir, records)
    (run_dir / "config.json").write_text(
        json.dumps({"model": {}, "train": {"max_steps": 40}, "task": {"name": task, "options": {}}})
    )
    return RunFacts.read(run_dir)


def test_the_accuracy_of_a_task_has_a_curve_and_so_have_other_lengths(tmp_path):
    (figure,) = metric_figure(facts(tmp_path / "run"))
    assert "Accuracy against tokens" in figure
    assert "from 40.0% to 80.0%" in figure
    # two validations of the accuracy, and two of the accuracy at another length
    assert figure.count("dot train") == figure.count("dot held-out") == 2
    assert "Accuracy against tokens" in render(facts(tmp_path / "other"))


def test_a_run_on_images_counts_images(tmp_path):
    found = facts(tmp_path / "run", task="image")
    page = render(found)
    for words in ("Accuracy against images", "Loss against images", "training images", "images per second"):
        assert words in page
    assert "nats per example" in page
    assert '"counted":"images"' in page.replace(" ", "")
    for words in ("Loss against tokens", "training tokens", "nats per token", "held-out text"):
        assert words not in page
    (axes, _) = loss_figure(found.train, found.validation, found).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training images", "nats per example")


def test_perplexity_follows_from_the_loss_and_has_no_curve(tmp_path):
    assert metric_figure(facts(tmp_path / "run", task="language")) == []


def test_a_late_label_stands_left_of_its_line(tmp_path):
    early, late = (render(facts(tmp_path / str(step), resumed_at=step)) for step in (5, 35))
    assert '<span class="moment" ' in early
    assert '<span class="moment before" ' in late
    assert '<span class="moment" ' not in late
