"""Runs in processes of their own, stopped in every way there is, then compared with a run left alone."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

import hgrn2
from hgrn2.data.prepare import prepare
from hgrn2.train import checkpoint
from tests.train.tiny_run import losses, run, run_language, run_with_file_limit

# short steps and a checkpoint every few of them: a kill at random lands anywhere, within a checkpoint too
SETTINGS = {
    "max_steps": 600,
    "batch_size": 4,
    "seq_len": 16,
    "learning_rate": 1e-2,
    "validation_every": 10,
    "checkpoint_every": 7,
    "sample_every": 25,
}


@pytest.fixture(scope="module")
def processes():
    # forked from a server that has everything loaded, so that a life of milliseconds gets to its first steps;
    # the server finds its modules by the environment alone
    folders = [
        str(Path(hgrn2.__file__).parents[1]),
        str(Path(__file__).parents[2]),
        os.environ.get("PYTHONPATH", ""),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.train.tiny_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
        start(context, target=time.time).join()
        yield context


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"document {index} " * (3 + index))
    return prepare([str(folder)], "bytes", folder / "prepared", progress=False).directory


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(run_dir, SETTINGS)
    return losses(run_dir)


def start(processes, *args, target=run):
    process = processes.Process(target=target, args=args)
    process.start()
    return process


def wait_for_steps(run_dir, num_lines, process):
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_killed_at_random_moments(processes, data_dir, tmp_path, stream):
    """The real model, with dropout; ten moments when packed, and some more with the state carried along."""
    settings = {
        "max_steps": 60 if stream else 150,
        "batch_size": 2,
        "seq_len": 24,
        "stream": stream,
        "validation_tokens": 100,
        "validation_every": 10,
        "checkpoint_every": 3,
        "device": "cpu",
    }
    run_language(tmp_path / "uninterrupted", settings, data_dir)
    run_dir = tmp_path / "run"
    seed = random.randrange(2**32)
    print(f"moments drawn with seed {seed}")
    generator = random.Random(seed)
    for moment in range(3 if stream else 10):
        process = start(processes, run_dir, settings, data_dir, target=run_language)
        # half of the lives end after some more steps, half anywhere: before the first record, too
        if moment % 2 == 0:
            path = run_dir / "metrics.jsonl"
            before = path.read_bytes().count(b"\n") if path.exists() else 0
            wait_for_steps(run_dir, before + generator.randrange(1, 12), process)
        time.sleep(generator.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for path in checkpoint.checkpoints_of(run_dir):
        checkpoint.load_checkpoint(path)
    run_language(run_dir, settings, data_dir)
    assert losses(run_dir) == losses(tmp_path / "uninterrupted")
    assert not list(run_dir.rglob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint_and_end_well(processes, uninterrupted, tmp_path, number):
    run_dir = tmp_path / "run"
    process = start(processes, run_dir, SETTINGS)
    wait_for_steps(run_dir, 20, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
    newest = checkpoint.load_checkpoint(checkpoint.checkpoints_of(run_dir)[-1])
    stopped_at = losses(run_dir)[-1][0]
    assert newest.state["step"] == stopped_at
    assert 0 < stopped_at < SETTINGS["max_steps"]
    run(run_dir, SETTINGS)
    assert losses(run_dir) == uninterrupted


def test_a_second_signal_interrupts_at_once(tmp_path):
    def two_signals(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    class Impatient:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def train(self, record, progress, eta_s):
            two_signals(record["step"])

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SETTINGS, display=Impatient())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_disk_that_fills_up(processes, uninterrupted, tmp_path):
    """No file may grow beyond a limit, which metrics.jsonl meets in the middle of a line."""
    run_dir = tmp_path / "run"
    process = start(processes, run_dir, SETTINGS, 30_001, target=run_with_file_limit)
    process.join(30)
    assert process.exitcode == 0
    found = json.loads(run_dir.with_suffix(".error").read_text())
    assert found["errno"] is not None
    newest = checkpoint.checkpoints_of(run_dir)[-1]
    assert f"last good checkpoint: {newest}" in found["text"]
    assert f"hgrn2 train --resume {run_dir}" in found["text"]
    assert (run_dir / "metrics.jsonl").stat().st_size == 30_001
    assert not list(run_dir.rglob(".tmp-*"))
    run(run_dir, SETTINGS)
    assert losses(run_dir) == uninterrupted
