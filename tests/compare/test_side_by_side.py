"""Runs that share a process: each has the result that it has alone, whatever happens to its neighbours."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hgrn2.compare.comparison import compare
from hgrn2.compare.grid import can_share
from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import PlannedRun
from hgrn2.compare.progress import PlainGrid
from hgrn2.train.metrics import read_metrics
from tests.compare.tiny import MODELS, MQAR, comparison
from tests.refusals import refuses


class Quiet(PlainGrid):
    """Keeps what has ended."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def show(self, progress):
        pass

    def ended(self, run, outcome, progress):
        self.ends.append((run.folder, outcome))


def curves(out):
    found = {}
    for run_dir in sorted((out / "runs").iterdir()):
        records = read_metrics(run_dir)
        keys = ("step", "loss", "grad_norm", "val_loss", "val_accuracy")
        found[run_dir.name] = [[r.get(k) for k in keys] for r in records if r["kind"] in ("train", "validation")]
    return found


def grid(**changes):
    """Return two models with two seeds, and a rate at which a model diverges at once."""
    models = {"hgrn2": {"learning_rates": [1e-2, 1e30]}, "attention": MODELS["attention"]}
    train = {"device": "cpu", "num_threads": 1, "warmup_steps": 0, "clip_norm": 0.0, "weight_decay": 0.0,
             "max_nonfinite": 2, "validation_every": 20, "report": False}  # fmt: skip
    task = {**MQAR, "max_steps": 60, "training_examples": 40}
    return comparison(models=models, seeds=[0, 1], tasks={"mqar": task}, train=train, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    compare(grid(), out, 2, Quiet())
    return out


@pytest.mark.slow
def test_results_are_those_of_runs_alone_and_a_diverged_run_harms_no_other(alone, tmp_path):
    ended = compare(grid(), tmp_path / "out", 6, Quiet(), runs_per_process=3)
    states = {run.planned.folder: run.state for run in ended.results.runs}
    assert {name for name, state in states.items() if state == "diverged"} == {
        "mqar.hgrn2.lr1e+30.seed0", "mqar.hgrn2.lr1e+30.seed1",
    }  # fmt: skip
    assert sorted(states.values()) == ["diverged"] * 2 + ["finished"] * 4
    # to the bit: other seeds, weights and batches train in the same process
    assert curves(tmp_path / "out") == curves(alone)
    assert len({repr(curve) for curve in curves(alone).values()}) == 6


@pytest.mark.slow
def test_runs_of_a_killed_process_are_trained_alone(alone, tmp_path):
    out, killed = tmp_path / "out", []

    def kill():
        """Kill the process that holds several runs, as the system does when memory is short."""
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if list(out.glob("runs/*/metrics.jsonl")):
                import multiprocessing

                killed.extend(multiprocessing.active_children())
                os.kill(killed[0].pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    display = Quiet()
    ended = compare(grid(), out, 6, display, runs_per_process=6)
    thread.join()
    assert len(killed) == 1
    # shown once as stopped, and again with their outcome
    assert {outcome for _, outcome in display.ends} >= {None, Outcome("finished")}
    assert len(ended.results.in_state("finished")) == 4
    assert len(ended.results.in_state("diverged")) == 2
    assert curves(out) == curves(alone)


@pytest.mark.slow
def test_a_signal_stops_every_run_and_the_next_call_resumes_each(alone, tmp_path):
    out = tmp_path / "out"

    class Stopping(Quiet):
        def show(self, progress):
            if any(message is not None for message in progress.running.values()) and not self.ends:
                self.ends.append(None)
                os.kill(os.getpid(), signal.SIGTERM)

    first = compare(grid(), out, 6, Stopping(), runs_per_process=6)
    assert first.stopped_by == "SIGTERM"
    second = compare(grid(), out, 6, Quiet(), runs_per_process=6)
    assert second.stopped_by is None
    assert curves(out) == curves(alone)


@pytest.mark.slow
def test_an_error_of_one_run_is_found_alone(tmp_path):
    out = tmp_path / "out"
    wanted = comparison(tasks={"mqar": {**MQAR, "max_steps": 3}}, seeds=[0, 1])
    blocked = out / "runs" / "mqar.hgrn2.lr0.01.seed1"
    blocked.mkdir(parents=True)
    # not a folder, so that no checkpoint can be written
    (blocked / "checkpoints").write_text("")
    ended = compare(wanted, out, 4, Quiet(), runs_per_process=4)
    (failed,) = ended.results.in_state("failed")
    assert failed.planned.folder == blocked.name
    assert failed.reason
    assert len(ended.results.in_state("finished")) == 3


@pytest.mark.slow
def test_runs_that_have_ended_lose_their_weights_if_asked(tmp_path):
    wanted = comparison(keep_checkpoints=False, models={"hgrn2": {}})
    out = tmp_path / "out"
    ended = compare(wanted, out, 1, Quiet())
    assert len(ended.results.in_state("finished")) == 1
    assert not list(out.glob("runs/*/checkpoints"))
    # nothing is trained again
    display = Quiet()
    compare(None, out, 1, display)
    assert display.ends == []


def test_only_runs_that_do_not_depend_on_neighbours_share():
    def planned(model=None, **settings):
        return PlannedRun("a", "hgrn2", "mqar", "mqar", 0, 1e-3, model or {}, settings, None)

    assert can_share(planned(), uses_gpu=False)
    assert not can_share(planned(), uses_gpu=True)
    assert can_share(planned(cuda_graph=True), uses_gpu=True)
    assert not can_share(planned({"dropout": 0.1}), uses_gpu=False)
    assert not can_share(planned(compile=True), uses_gpu=False)


def test_a_wrong_value_is_refused():
    with refuses("invalid-value", "keep_checkpoints", "yes"):
        comparison(keep_checkpoints="yes")
