import errno
import json
import os
import sys
import time

import pytest

from hgrn2.errors import UserError
from hgrn2.train.metrics import MetricsWriter, read_metrics

REST = {"tokens": 8, "elapsed_s": 0.5}


def write(run_dir, steps, **options):
    with MetricsWriter(run_dir, **options) as metrics:
        for step in steps:
            metrics.write({"kind": "train", "step": step, "loss": 1.0 / step, **REST})


def test_records_are_whole_lines_at_once(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": 0.1, **REST})
        assert [r["loss"] for r in read_metrics(tmp_path)] == [0.1]
        metrics.write({"kind": "train", "step": 2, "loss": float("nan"), **REST})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] is None


@pytest.mark.parametrize("torn", ['{"kind": "tra', '{"kind": "train", "step": 3, "loss": 9.0}', '{"text": "é'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode()[:-1] if torn.endswith("é") else torn.encode())
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], resume_step=2)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3], resume_step=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, [1])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start", "step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"kind": "train"}, "step is None, wanted a whole number"),
        ({"kind": "train", "step": "a"}, "step is 'a', wanted a whole number"),
        ({"step": 1}, "kind is None, wanted a word"),
        ({"kind": "train", "step": 1, "tokens": 8, "elapsed_s": 1.0}, "a train record without loss"),
        ({"kind": "train", "step": 1, "loss": "x", **REST}, "loss is 'x', wanted a number"),
        ({"kind": "train", "step": 1, "loss": 1.0, "tokens": None, "elapsed_s": 1.0}, "tokens is None"),
        ({"kind": "train", "step": 1, "loss": 1.0, "tokens": 8, "elapsed_s": float("inf")}, "elapsed_s is inf"),
        ({"kind": "validation", "step": 1, **REST}, "a validation record without val_loss"),
        ({"kind": "validation", "step": 1, "val_loss": 1.0, "val_bits_per_byte": "y", **REST}, "val_bits_per_byte is"),
    ],
)
def test_a_record_that_no_run_writes_is_named(tmp_path, record, fault):
    start = '{"kind": "start", "step": 0}\n'
    (tmp_path / "metrics.jsonl").write_text(start + json.dumps(record) + "\n" + start)
    with pytest.raises(UserError, match=f"line 2: {fault}"):
        read_metrics(tmp_path)
    # a line without its end was torn by a kill
    (tmp_path / "metrics.jsonl").write_text(start + json.dumps(record))
    assert len(read_metrics(tmp_path)) == 1


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "nothing")


def test_tensorboard_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, [1, 2, 3])
    with pytest.raises(UserError, match=r"pip install 'hgrn2\[tensorboard\]'"):
        MetricsWriter(tmp_path, resume_step=1, tensorboard=True, before_dropping=lambda: pytest.fail("too early"))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_checkpoints_go_before_records(tmp_path):
    write(tmp_path, [1, 2, 3])
    seen = []
    write(tmp_path, [], resume_step=1, before_dropping=lambda: seen.extend(r["step"] for r in read_metrics(tmp_path)))
    assert seen == [1, 2, 3]
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_tensorboard_takes_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": 0.5, "grad_norm": None})
        metrics.write({"kind": "sample", "step": 1, "text": "words"})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5)]
    assert events.Tags()["scalars"] == ["train/loss"]


@pytest.mark.parametrize("resume_step", [0, 1])
def test_tensorboard_hides_steps_that_are_trained_again(tmp_path, resume_step):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, [1, 2], tensorboard=True)
    # event files are told apart by the second
    later = time.time() + 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        write(tmp_path, [1, 2][resume_step:], resume_step=resume_step, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2]


def test_a_full_disk_keeps_the_records_there_were(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path, resume_step=1)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
