"""Settings for many tiny runs: sparse records, an end at a metric, no best checkpoint; and runs in threads."""

from __future__ import annotations

import threading

import pytest
import torch

from hgrn2.formats.run_folder import checkpoints_of
from hgrn2.models import HGRN2Config
from hgrn2.tasks import ParityOptions
from hgrn2.train import interrupt
from hgrn2.train.exclusive import exclusive, is_side_by_side, side_by_side
from hgrn2.train.interrupt import StopRequest, request_stop
from hgrn2.train.metrics import read_metrics
from hgrn2.train.rng import shielded_rng
from hgrn2.train.runs import resume_task_run, start_task_run
from hgrn2.train.settings import RunSettings

MODEL = HGRN2Config(vocab_size=2, hidden_size=16, num_hidden_layers=1, expand_ratio=8, intermediate_size=16)
SETTINGS = {"max_steps": 12, "batch_size": 4, "length": 4, "validation_examples": 8, "validation_every": 5,
            "checkpoint_every": 0, "learning_rate": 1e-2, "device": "cpu"}  # fmt: skip


def train(run_dir, **changes):
    return start_task_run(run_dir, MODEL, RunSettings.from_flat({**SETTINGS, "report": False, **changes}, "parity"))


def records(run_dir, kind="train"):
    return {r["step"]: r for r in read_metrics(run_dir) if r["kind"] == kind}


def test_sparse_records_are_some_of_all(tmp_path, capsys):
    train(tmp_path / "all")
    train(tmp_path / "some", record_every=4)
    every, some = records(tmp_path / "all"), records(tmp_path / "some")
    # each fourth; the last step before a validation and the last of the run
    assert list(some) == [4, 5, 8, 10, 12]
    for step, record in some.items():
        for key in ("loss", "smoothed_loss", "grad_norm", "tokens", "learning_rate"):
            assert record[key] == every[step][key]
    for one, two in zip(records(tmp_path / "all", "validation").values(),
                        records(tmp_path / "some", "validation").values(), strict=True):  # fmt: skip
        assert one["val_loss"] == two["val_loss"]


def test_a_run_ends_at_the_validation_that_reaches_the_metric(tmp_path, capsys):
    reached = train(tmp_path / "a", stop_at=0.01)
    assert reached.result.counters.step == 5
    assert reached.result.stopped_by is None
    assert list(records(tmp_path / "a", "validation")) == [5]
    # it has ended: nothing is left to resume
    assert resume_task_run(tmp_path / "a").result.had_ended
    assert train(tmp_path / "b", stop_at=1.01).result.counters.step == 12


def test_the_best_validation_writes_no_checkpoint_if_that_is_not_wanted(tmp_path, capsys):
    train(tmp_path / "a")
    train(tmp_path / "b", save_best=False)
    assert len(checkpoints_of(tmp_path / "a")) > 1
    assert [path.name for path in checkpoints_of(tmp_path / "b")] == ["step-00000012"]


def test_the_report_is_left_out_if_it_is_not_wanted(tmp_path, capsys):
    run = train(tmp_path / "a")
    assert run.report is None
    assert not (tmp_path / "a" / "report.html").exists()
    assert train(tmp_path / "b", report=True).report == tmp_path / "b" / "report.html"


def test_a_request_stops_runs_in_other_threads_only(monkeypatch):
    monkeypatch.setattr(interrupt, "_requested", [])
    found = {}

    def look():
        with StopRequest() as stop:
            found["before"] = stop.signal_name
            request_stop("SIGTERM")
            found["after"] = stop.signal_name

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with StopRequest() as stop:
        assert stop.signal_name is None
    assert found == {"before": None, "after": "SIGTERM"}


def test_a_thread_beside_others_leaves_the_generators_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with side_by_side(None):
        assert is_side_by_side()
        # another run may draw in between, so nothing may be restored afterwards
        with shielded_rng(5):
            first = torch.rand(1)
        second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), wanted)
    assert not is_side_by_side()


def test_one_thread_at_a_time_holds_the_process():
    order = []

    def work():
        with exclusive():
            order.append("other")

    with exclusive(), exclusive():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_examples_on_a_device_are_those_of_the_stream():
    from hgrn2.tasks.device_examples import shared_examples
    from hgrn2.tasks.generators.base import VALIDATION
    from hgrn2.tasks.synthetic import SyntheticBatch, _ExampleStream

    device = torch.device("cpu")
    for options in (ParityOptions(length=6, training_examples=10), ParityOptions(length=6)):
        stream = _ExampleStream(options, 3) if options.training_examples else _ExampleStream(options, 3, VALIDATION)
        # across the end of an epoch
        for start, count in ((0, 4), (8, 5), (25, 7)):
            if not options.training_examples and start + count > 40:
                continue
            found = SyntheticBatch(*stream.rows(start, count, device, 40).gather())
            wanted = SyntheticBatch.of(stream.take(start, count))
            for name in ("input_ids", "positions", "targets"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), (name, start)
            assert (found.num_tokens, found.num_targets) == (wanted.num_tokens, wanted.num_targets)
    # drawn once for all runs of the process
    one, two = (shared_examples(ParityOptions(length=6), 8, 0, device) for _ in range(2))
    assert one is two
    assert shared_examples(ParityOptions(length=6), 8, 1, device) is not one


def test_examples_are_drawn_by_one_thread():
    from hgrn2.tasks.device_examples import Shared

    made, shared = [], Shared(2)

    def make(name):
        made.append(name)
        return object()

    barrier, found = threading.Barrier(4), []

    def work():
        barrier.wait()
        found.append(shared.get("a", lambda: make("a")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    assert len(set(map(id, found))) == 1
    for name in ("b", "c"):
        shared.get(name, lambda name=name: make(name))
    # the oldest was dropped
    shared.get("a", lambda: make("a again"))
    assert made == ["a", "b", "c", "a again"]


@pytest.mark.parametrize("changes", [{"record_every": 0}, {"stop_at": "high"}])
def test_wrong_settings_are_refused(changes):
    from tests.refusals import refuses

    with refuses("invalid-value", *changes):
        RunSettings.from_flat({**SETTINGS, **changes}, "parity")
