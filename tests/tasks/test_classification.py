"""The base of classification tasks: losses against plain float64, counts, figures and the report's section."""

import json

import pytest
import torch
from torch.nn import functional

from hgrn2.tasks import classification_loss
from hgrn2.tasks.classification import ClassCounts, worst_classes
from hgrn2.train.report.confusion import classes
from hgrn2.train.report.facts import RunFacts
from tests.refusals import refuses


def drawn(num=50, num_classes=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num, num_classes, generator=generator, dtype=dtype)
    return logits.requires_grad_(), torch.randint(num_classes, (num,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_labels_and_probabilities(smoothing):
    logits, labels = drawn()
    wanted = functional.one_hot(labels, 7).double()
    other = functional.one_hot(labels.roll(1), 7).double()
    for targets, probabilities in ((labels, wanted), (0.7 * wanted + 0.3 * other,) * 2):
        loss, sums = classification_loss(logits, targets, smoothing)
        smoothed = (1 - smoothing) * probabilities + smoothing / 7
        plain = -(smoothed * (logits - logits.logsumexp(-1, keepdim=True))).sum()
        torch.testing.assert_close(loss, plain)
        found, expected = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(plain, logits)[0]
        torch.testing.assert_close(found, expected)
        assert int(sums["accuracy"]) == int((logits.argmax(-1) == probabilities.argmax(-1)).sum())


def test_targets_of_another_shape_are_refused():
    logits, labels = drawn()
    for targets in (labels[:-1], labels.double(), functional.one_hot(labels, 7), torch.rand(50, 6)):
        with refuses("invalid-value", "targets", "[50, 7]"):
            classification_loss(logits, targets)


def test_counts_in_batches_are_those_of_the_whole():
    logits, labels = drawn()
    logits = logits.detach()
    counts = ClassCounts(7, "cpu")
    for part in range(0, 60, 20):
        counts.add(logits[part : part + 20], labels[part : part + 20])
    figures = counts.figures([f"c{i}" for i in range(7)])
    predicted = logits.argmax(-1)
    table = [[int(((labels == a) & (predicted == b)).sum()) for b in range(7)] for a in range(7)]
    assert json.loads(figures["val_confusion"]) == {"classes": [f"c{i}" for i in range(7)], "counts": table}
    assert figures["val_accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert figures["val_top5"] == pytest.approx(float((ranks < 5).double().mean()))
    assert figures["val_loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)))


def test_few_classes_have_no_top5_and_many_no_confusion():
    counts = ClassCounts(3, "cpu")
    counts.add(torch.eye(3), torch.arange(3))
    assert "val_top5" not in counts.figures(["a", "b", "c"])
    counts = ClassCounts(100, "cpu")
    counts.add(torch.eye(100), torch.arange(100))
    assert "val_confusion" not in counts.figures([str(i) for i in range(100)])


def test_no_examples_and_other_classes_are_refused():
    with refuses("not-found", "validation"):
        ClassCounts(3, "cpu").figures(["a", "b", "c"])
    with refuses("mismatch", "[2, 4]", 3):
        ClassCounts(3, "cpu").add(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


def test_worst_classes_leave_out_empty_ones():
    confusion = torch.tensor([[9, 1, 0], [3, 1, 0], [0, 0, 0]])
    text = worst_classes(confusion, ["cat", "dog", "empty"])
    assert text.startswith("dog 25.0%")
    assert "cat 90.0%" in text
    assert "empty" not in text


def test_the_report_shows_confusions(tmp_path):
    counts = ClassCounts(2, "cpu")
    counts.add(torch.eye(2)[[0, 0, 1, 1, 1]], torch.tensor([0, 1, 1, 1, 0]))
    figures = counts.figures(["cat", "<b>"])
    record = {"kind": "validation", "step": 1, "tokens": 1, "elapsed_s": 1.0, **figures}
    page = classes(RunFacts(tmp_path, [record]))
    assert "cat 50.0%" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<td title") == 4
    for damaged in ("{", "[1]", json.dumps({"classes": ["a"], "counts": [[1, 2]]}), None):
        assert "<table" not in classes(RunFacts(tmp_path, [{**record, "val_confusion": damaged}]))
    assert classes(RunFacts(tmp_path, [{**record, "val_confusion": None, "val_worst_classes": None}])) == ""
