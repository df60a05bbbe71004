"""Whole comparisons in processes of their own: interrupted, killed, continued, extended."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

import hgrn2
from hgrn2 import cli
from hgrn2.compare import grid as grid_module
from hgrn2.compare.comparison import compare
from hgrn2.compare.files import repeat_command
from hgrn2.compare.grid import Slots
from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import Plan, PlannedRun, make_plan
from hgrn2.compare.progress import GridProgress, PlainGrid, make_grid_display
from hgrn2.compare.worker import Progress
from hgrn2.train.metrics import read_metrics
from tests.compare.tiny import MODELS, MQAR, comparison
from tests.pages import Page
from tests.refusals import refuses

TEXT = {"task": "language", "max_steps": 6, "seq_len": 32, "batch_size": 2, "validation_tokens": 256}


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"]


class Quiet(PlainGrid):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def show(self, progress):
        self.lines.append(progress.left_s())

    def ended(self, run, outcome, progress):
        self.lines.append((run.folder, outcome))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"The {i}th story begins here, with a hero.\nAnd then it ends.\n" * 20)
    return folder


@pytest.fixture(scope="module")
def grid(text_folder, tmp_path_factory):
    """Two models on two tasks with one seed; one model has a further learning rate that diverges."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    data = {"data": [str(text_folder)], "tokenizer": "bytes"}
    models = {"hgrn2": {"learning_rates": [1e-2, 1e30]}, "attention": MODELS["attention"]}
    wanted = comparison(
        models=models,
        tasks={"mqar": MQAR, "text": {**TEXT, "data": data}},
        train={"device": "cpu", "num_threads": 1, "warmup_steps": 0, "clip_norm": 0.0, "weight_decay": 0.0,
               "max_nonfinite": 2},
    )  # fmt: skip
    return out, wanted, compare(wanted, out, 2, Quiet())


@pytest.mark.slow
def test_a_grid_of_two_models_and_two_tasks(grid):
    out, _, ended = grid
    assert ended.stopped_by is None
    states = {run.planned.folder: run.state for run in ended.results.runs}
    assert states == {
        "mqar.hgrn2.lr0.01.seed0": "finished",
        "mqar.hgrn2.lr1e+30.seed0": "diverged",
        "mqar.attention.lr0.01.seed0": "finished",
        "text.hgrn2.lr0.01.seed0": "finished",
        "text.hgrn2.lr1e+30.seed0": "diverged",
        "text.attention.lr0.01.seed0": "finished",
    }
    assert all(run.reason for run in ended.results.in_state("diverged"))
    assert [path.name for path in ended.files[:3]] == ["report.html", "report.md", "results.csv"]
    Page((out / "report.html").read_text(encoding="utf-8"))
    # each is a run like any other
    for run in ended.results.in_state("finished"):
        assert (out / "runs" / run.planned.folder / "report.html").exists()
        cells = [cell for task in ended.results.tasks for cell in task.cells]
        (own,) = [cell for cell in cells if (cell.task, cell.model) == (run.planned.task_entry, run.planned.model)]
        assert run.facts.num_parameters == own.cost.parameters


@pytest.mark.slow
def test_a_run_of_the_grid_is_repeated_to_the_bit(grid, tmp_path, monkeypatch, capsys):
    out, _, ended = grid
    monkeypatch.chdir(tmp_path)
    for folder in ("text.attention.lr0.01.seed0", "mqar.hgrn2.lr0.01.seed0"):
        (run,) = [run for run in ended.results.runs if run.planned.folder == folder]
        words = repeat_command(out, run.planned).split()[1:]
        assert cli.main(words) == 0, capsys.readouterr().err
        assert losses(tmp_path / "runs" / folder) == losses(out / "runs" / folder)


@pytest.mark.slow
def test_what_has_ended_is_skipped_and_what_was_cut_off_is_resumed(grid):
    out, wanted, _ = grid
    kept, cut = (out / "runs" / f"mqar.{model}.lr0.01.seed0" for model in ("hgrn2", "attention"))
    before, times = losses(cut), (kept / "metrics.jsonl").stat().st_mtime_ns
    # as after kill -9 before the outcome was written
    (cut / "outcome.json").unlink()
    display = Quiet()
    ended = compare(wanted, out, 1, display)
    assert [line[0] for line in display.lines if isinstance(line, tuple)] == [cut.name]
    assert losses(cut) == before
    assert (kept / "metrics.jsonl").stat().st_mtime_ns == times
    assert len(ended.results.in_state("finished")) == 4


def start_command(out, file, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "hgrn2", "compare", str(file), "--out", str(out), "--jobs", "1", *words],
        env=os.environ | {"PYTHONPATH": str(Path(hgrn2.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_records(path, count):
    deadline_s = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline_s, path
        time.sleep(0.02)


FILE = """
seeds = [0]
learning_rates = [0.01]
[model]
hidden_size = 16
num_hidden_layers = 2
expand_ratio = 8
intermediate_size = 24
mixers = { attention = { num_heads = 2 } }
[train]
device = "cpu"
num_threads = 1
checkpoint_every = 20
[models.hgrn2]
[models.attention]
[tasks.mqar]
length = 16
num_pairs = 2
vocab_size = 16
validation_examples = 16
batch_size = 4
max_steps = 120
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_or_killed_comparison_goes_on(tmp_path, capsys, number):
    """By Ctrl-C it stops cleanly and says how to continue; after kill -9, of itself or of a worker, it continues."""
    file, out = tmp_path / "file.toml", tmp_path / "out"
    file.write_text(FILE)
    process = start_command(out, file)
    first, second = (out / "runs" / f"mqar.{model}.lr0.01.seed0" for model in ("hgrn2", "attention"))
    wait_for_records(first / "metrics.jsonl", 30)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"hgrn2 compare {file} --out {out}" in err
        assert "Traceback" not in err
        assert (out / "report.html").exists()
        assert not second.exists()
    assert not (first / "outcome.json").exists()
    assert cli.main(["compare", str(file), "--out", str(out), "--jobs", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"report   {out}/report.html\n")
    assert [Outcome.load(run).state for run in (first, second)] == ["finished", "finished"]
    steps = [record["step"] for record in read_metrics(first) if record["kind"] == "train"]
    assert steps == list(range(1, 121))
    starts = [record["step"] for record in read_metrics(first) if record["kind"] == "start"]
    # resumed, not begun again
    assert len(starts) == 2
    assert starts[1] > 0


@pytest.mark.slow
def test_a_worker_that_is_killed_is_recorded_and_tried_again(tmp_path):
    class Killing(Quiet):
        def show(self, progress):
            # the worker of the first run, once it trains
            if any(progress.running.values()) and not self.lines:
                (worker,) = _workers()
                self.lines.append("killed")
                os.kill(worker, signal.SIGKILL)

    train = {"device": "cpu", "num_threads": 1, "checkpoint_every": 10}
    wanted = comparison(tasks={"mqar": {**MQAR, "max_steps": 200}}, train=train)
    out = tmp_path / "out"
    ended = compare(wanted, out, 1, Killing())
    first, second = ended.results.runs
    assert (first.state, second.state) == ("failed", "finished")
    assert "SIGKILL" in first.reason
    display = Quiet()
    ended = compare(wanted, out, 1, display)
    assert [line[0] for line in display.lines if isinstance(line, tuple)] == [first.planned.folder]
    assert [run.state for run in ended.results.runs] == ["finished", "finished"]


def _workers() -> list[int]:
    """Processes that lead a session of their own, started from here."""
    from multiprocessing import active_children

    return [child.pid for child in active_children() if child.pid is not None]


def planned(folder, model="hgrn2", **settings):
    return PlannedRun(folder, model, "mqar", "mqar", 0, 1e-3, {}, settings, None)


def test_time_left_follows_from_runs_that_have_ended(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hgrn2.compare.progress.time.monotonic", lambda: now[0])
    runs = [planned("a"), planned("b"), planned("c", "attention"), planned("d", "attention")]
    progress = GridProgress(runs, {"a", "b", "c", "d"}, 2)
    assert progress.left_s() is None
    progress.start("a")
    progress.start("c")
    progress.update("a", Progress(0.0, 0, 1.0))
    progress.update("c", Progress(0.0, 0, 1.0))
    now[0] = 10.0
    progress.update("a", Progress(0.5, 5, 1.0))
    # 20 s each: half of one and three others, two at a time
    assert progress.left_s() == pytest.approx((10 + 3 * 20) / 2)
    progress.end("a", Outcome("finished"))
    now[0] = 20.0
    progress.update("c", Progress(0.25, 5, 1.0))
    # another of 10 s, and of 80 s three quarters and a whole
    assert progress.left_s() == pytest.approx((10 + 60 + 80) / 2)
    assert progress.fraction == pytest.approx(1.25 / 4)
    progress.end("c", None)
    assert progress.num_ended == 1


def test_slots_follow_from_the_device(monkeypatch):
    monkeypatch.setattr("hgrn2.compare.grid.os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Slots.for_machine([planned("a")]) == Slots(8, 0)
    assert Slots.for_machine([planned("a", num_threads=4)]) == Slots(2, 0)
    assert Slots.for_machine([planned("a")], jobs=3) == Slots(3, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Slots.for_machine([planned("a")]) == Slots(8, 2)
    assert Slots.for_machine([planned("a", device="cuda:1")]) == Slots(4, 0)
    assert Slots.for_machine([planned("a", device="cpu", num_threads=1)]) == Slots(8, 0)
    captured = {"cuda_graph": True, "max_steps": 1, "batch_size": 64, "length": 64}
    tiny = dataclasses.replace(planned("a", **captured), model_config={"hidden_size": 64})
    assert Slots.for_machine([tiny]) == Slots(32, 2, 8)
    assert Slots.for_machine([tiny], jobs=4) == Slots(4, 2, 4)
    wide = dataclasses.replace(tiny, model_config={"hidden_size": 512})
    assert Slots.for_machine([tiny, wide]) == Slots(8, 2)
    assert Slots.for_machine([wide], jobs=4, runs_per_process=2) == Slots(4, 2, 2)
    assert Slots(5, 1, 2).num_processes == 3


def test_a_process_sees_one_gpu(monkeypatch, tmp_path):
    class Process:
        seen: ClassVar[list] = []

        def __init__(self, **_):
            pass

        def start(self):
            self.seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))

    class Context:
        pass

    Context.Process, Context.Pipe = Process, lambda self: Pipe()
    monkeypatch.setattr(grid_module, "_context", lambda **_: Context())
    for visible, wanted in ((None, ["0", "1", "0"]), ("5,GPU-7", ["5", "GPU-7", "5"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        Process.seen.clear()
        runs = [planned(name) for name in "abc"]
        grid = grid_module._Grid(tmp_path, runs, Slots(4, 2), Quiet(), True, print)
        grid.start_runs()
        assert Process.seen == wanted
        assert [each.slot for each in grid.workers] == [0, 1, 2]
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.slow
def test_processes_that_share_nothing_train_too(tmp_path, monkeypatch):
    """As on a machine with a GPU, where no server forks them."""
    monkeypatch.setattr(grid_module, "_context", lambda **_: multiprocessing.get_context("spawn"))
    ended = compare(comparison(models={"hgrn2": {}}), tmp_path / "out", 1, Quiet())
    assert [run.state for run in ended.results.runs] == ["finished"]


def test_a_terminal_shows_the_grid_and_its_runs():
    screen = io.StringIO()
    display = make_grid_display(Console(file=screen, force_terminal=True, width=90))
    runs = [planned("first.run"), planned("second.run")]
    progress = GridProgress(runs, {"first.run", "second.run"}, 2)
    with display:
        for folder in ("first.run", "second.run"):
            progress.start(folder)
        progress.update("second.run", Progress(0.42, 5, 1.25))
        display.show(progress)
        progress.end("first.run", Outcome("diverged", "not finite"))
        display.ended(runs[0], Outcome("diverged", "not finite"), progress)
    shown = screen.getvalue()
    assert "first.run diverged: not finite" in shown
    assert "1 of 2 runs (1 diverged), left" in shown
    assert re.search(r"second\.run +42% +loss 1\.2500", shown)


def test_plain_lines_without_a_terminal(capsys):
    display = make_grid_display(Console(file=io.StringIO()))
    runs = [planned("a"), planned("b")]
    progress = GridProgress(runs, {"a", "b"}, 1)
    with display:
        progress.start("a")
        progress.end("a", Outcome("finished"))
        display.ended(runs[0], Outcome("finished"), progress)
        display.ended(runs[1], None, progress)
    assert re.fullmatch(
        r"1 of 2 runs, left \S+: a finished\n1 of 2 runs, left \S+: b stopped\n", capsys.readouterr().err
    )


def test_flags_that_contradict_each_other(tmp_path, capsys):
    for words in (
        ["--report-only", "x", "--jobs", "2"], ["--jobs", "0"], ["--report-only", str(tmp_path)],
        ["--start-for-s", "-1"], ["--start-for-s", "nan"],
    ):  # fmt: skip
        assert cli.main(["compare", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_device_that_is_not_there_is_found_before_training(tmp_path):
    out = tmp_path / "out"
    wanted = comparison(train={"device": "tpu"})
    with refuses("unknown-name", "tpu"):
        compare(wanted, out, 1, Quiet())
    for run in make_plan(wanted, out).runs:
        Outcome("finished").save(out / "runs" / run.folder)
    # nothing is left to train
    assert compare(wanted, out, 1, Quiet()).stopped_by is None


def test_a_failed_run_is_seen_in_the_exit_status(tmp_path, monkeypatch):
    from tests.compare.tiny import invent

    out = tmp_path / "out"
    plan = invent(out, comparison(), {"mqar.hgrn2.lr0.01.seed0": 0.5, "mqar.attention.lr0.01.seed0": None})
    monkeypatch.setattr("hgrn2.compare.comparison.train_grid", lambda *args, **settings: None)
    assert cli.main(["compare", "--out", str(out)]) == 0
    Outcome("failed", "no space left").save(out / "runs" / plan.runs[0].folder)
    assert cli.main(["compare", "--out", str(out)]) == 1


def test_report_only_writes_the_report_again(tmp_path, capsys):
    from tests.compare.tiny import invent

    out = tmp_path / "out"
    invent(out, comparison(), {"mqar.hgrn2.lr0.01.seed0": 0.5, "mqar.attention.lr0.01.seed0": 0.25})
    assert cli.main(["compare", "--report-only", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("50.00%") < shown.index("25.00%")
    assert shown.endswith(f"report   {out}/report.html\n")
    assert Plan.load(out).comparison == comparison()
