"""Run commands in the test's process, and read what runs have recorded."""

from __future__ import annotations

from pathlib import Path

from hgrn2 import cli
from hgrn2.train.metrics import read_metrics


def command(*words):
    assert cli.main([str(word) for word in words]) == 0


def refused(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def curve(run):
    keys = ("step", "loss", "grad_norm", "val_loss", "val_accuracy", "figures")
    return [[r.get(k) for k in keys] for r in read_metrics(Path(run)) if r["kind"] in ("train", "validation")]
