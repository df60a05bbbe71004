"""Runs that share a process on a GPU: captured steps on streams of their own, with the results of runs alone."""

from __future__ import annotations

import pytest
import torch

from hgrn2.compare.comparison import compare
from hgrn2.compare.progress import PlainGrid
from hgrn2.train.metrics import read_metrics
from tests.compare.tiny import comparison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


MODELS = {
    "hgrn2": {"learning_rates": [3e-3, 1e30]},
    "hgrn1": {},
    "mamba": {},
    "attention": {"mixers": {"attention": {"num_heads": 2}}},
}


def grid(*names, **train):
    settings = {
        "device": "cuda", "cuda_graph": True, "warmup_steps": 0, "clip_norm": 0.0, "max_nonfinite": 2,
        "validation_every": 20, "report": False, "record_every": 5, "checkpoint_every": 0, "save_best": False, **train,
    }  # fmt: skip
    task = {"length": 32, "num_pairs": 4, "vocab_size": 64, "validation_examples": 100, "training_examples": 500,
            "batch_size": 32, "max_steps": 60}  # fmt: skip
    model = {"hidden_size": 64, "num_hidden_layers": 2, "expand_ratio": 32, "intermediate_size": 0}
    return comparison(
        models={name: MODELS[name] for name in names}, model=model, match="none", seeds=[0], learning_rates=[3e-3],
        tasks={"mqar": task},
        train=settings,
    )  # fmt: skip


def curves(out):
    found = {}
    for run_dir in sorted((out / "runs").iterdir()):
        keys = ("step", "loss", "val_loss")
        records = [r for r in read_metrics(run_dir) if r["kind"] in ("train", "validation")]
        found[run_dir.name] = [[r.get(key) for key in keys] for r in records]
    return found


# each process compiles its kernels, which takes most of the time
@pytest.mark.parametrize(
    ("precision", "names"), [("float32", ("hgrn2", "attention")), ("bfloat16", ("hgrn2", "hgrn1", "mamba"))]
)
def test_results_are_those_of_runs_alone(precision, names, tmp_path):
    wanted = grid(*names, precision=precision)
    together = compare(wanted, tmp_path / "together", 5, PlainGrid(), runs_per_process=5)
    assert not together.results.in_state("failed", "waiting", "unfinished"), [
        (run.planned.folder, run.reason) for run in together.results.runs
    ]
    assert len(together.results.in_state("diverged")) == 1
    alone = compare(wanted, tmp_path / "alone", 5, PlainGrid(), runs_per_process=1)
    assert len(alone.results.in_state("finished")) == len(names)
    found, exact = curves(tmp_path / "together"), curves(tmp_path / "alone")
    assert found.keys() == exact.keys()
    for name in exact:
        if "1e+30" in name:
            continue
        for one, two in zip(found[name], exact[name], strict=True):
            assert one == pytest.approx(two, rel=1e-4), name


def test_sparse_records_are_those_of_every_step(tmp_path):
    found = {}
    for every in (1, 7):
        wanted = grid("hgrn2", record_every=every)
        wanted = comparison(**{**wanted.to_tables(), "models": {"hgrn2": {}}})
        compare(wanted, tmp_path / str(every), 1, PlainGrid())
        found[every] = {}
        for name, curve in curves(tmp_path / str(every)).items():
            found[every][name] = {step: loss for step, loss, _ in curve if loss is not None}
    for name, sparse in found[7].items():
        # the last step before a validation has a record as well
        assert {7, 14, 20, 21, 60} <= set(sparse)
        assert len(sparse) < 20
        for step, loss in sparse.items():
            assert loss == pytest.approx(found[1][name][step], rel=1e-5)
