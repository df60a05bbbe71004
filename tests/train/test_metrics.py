import contextlib
import errno
import json
import os
import sys
import time

import pytest

from hgrn2.errors import UserError
from hgrn2.train.metrics import MetricsWriter, read_metrics
from tests.refusals import refuses

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
    with refuses("damaged", "line 2"):
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
    with refuses("damaged", "line 2"):
        read_metrics(tmp_path)
    # a line without its end was torn by a kill
    (tmp_path / "metrics.jsonl").write_text(start + json.dumps(record))
    assert len(read_metrics(tmp_path)) == 1


def test_no_file(tmp_path):
    with refuses("not-found", tmp_path):
        read_metrics(tmp_path / "nothing")


def test_tensorboard_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, [1, 2, 3])
    with refuses("unavailable", "tensorboard"):
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


def test_no_flipped_bit_of_a_record_is_read_without_a_word(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    data, wanted = path.read_bytes(), read_metrics(tmp_path)
    start = data.index(b"\n") + 1
    for place in range(start - 2, len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            # what is read is what was written, as with 1E-5 for 1e-5
            with contextlib.suppress(UserError):
                assert read_metrics(tmp_path) == wanted, (place, bit)


def test_lines_of_older_runs_and_of_other_tools(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    line = json.loads(path.read_text())
    # in another layout and order, and a line without a checksum
    own = {"kind": "validation", "step": 1, "val_loss": 2.0, "val_accuracy": 0.5, **REST}
    path.write_text(json.dumps(dict(reversed(line.items())), separators=(",", ":")) + "\n" + json.dumps(own) + "\n")
    assert [record["kind"] for record in read_metrics(tmp_path)] == ["train", "validation"]
    assert "crc32" not in read_metrics(tmp_path)[0]
    path.write_text(json.dumps(line | {"loss": 3.0}) + "\n")
    with refuses("damaged", "line 1", "crc32"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"kind": "trainn", "step": 1}', "unknown key 'trainn'; did you mean 'train'"),
        (json.dumps({"kind": "train", "step": 1, "loss": 1.0, "grad_norn": 1.0, **REST}), "unknown key 'grad_norn'"),
        (json.dumps({"kind": "validation", "step": 1, "val_loss": 1.0, "crc33": "01234567", **REST}), "key 'crc33'"),
        ("[" * 200_000, "not JSON .nested too deep"),
        ('{"kind": "start", "step": ' + "9" * 6000 + "}", "not JSON .a number of thousands of digits"),
        ('{"kind": "start", "step": 1' + "0" * 4000 + ', "loss": 1}', "unknown key 'loss'"),
        ('{"kind": "train", "step": 1, "loss": 1' + "0" * 400 + ', "tokens": 1, "elapsed_s": 1}', "loss is 10+[.]{3},"),
        ('{"kind": "caf\udce9", "step": 1}', "not JSON .not UTF-8: byte 0xe9"),
    ],
)
def test_lines_that_no_run_has_written(tmp_path, line, fault):
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    with refuses("damaged", "line 1"):
        read_metrics(tmp_path)


def test_a_record_with_something_after_it_is_no_torn_one(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with refuses("damaged", "line 2"):
        read_metrics(tmp_path)
