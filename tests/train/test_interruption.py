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
from hgrn2.formats import run_folder
from hgrn2.train import checkpoint
from tests.train.tiny_run import (
    losses,
    run,
    run_in_a_terminal_until_signals,
    run_language,
    run_until_signals,
    run_with_file_limit,
)

# short steps and a checkpoint every few of them: a kill at random lands anywhere, within a checkpoint too
SETTINGS = {
    "max_steps": 600,
    "batch_size": 4,
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


def end_of(process):
    """The exit status of a process that ends by itself, or of one that is stuck."""
    try:
        process.join(120)
    finally:
        process.kill()
    process.join()
    return process.exitcode


def wait_for_steps(run_dir, num_lines, process):
    """Until the run has written some lines, or has ended."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < num_lines):
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("the run does not get on")
        time.sleep(0.002)


@pytest.mark.slow
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
        # on a machine that has other work, more steps are done by then than were waited for: even all of them
        assert process.exitcode in (-signal.SIGKILL, 0)
        if process.exitcode == 0:
            break
    for path in run_folder.checkpoints_of(run_dir):
        checkpoint.load_checkpoint(path)
    run_language(run_dir, settings, data_dir)
    assert losses(run_dir) == losses(tmp_path / "uninterrupted")
    assert not list(run_dir.rglob(".tmp-*"))


# a terminal that closes sends SIGHUP more than once
@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGHUP, signal.SIGHUP],
        [signal.SIGTERM, signal.SIGHUP],
    ],
)
def test_signals_write_a_checkpoint_and_end_well(processes, uninterrupted, tmp_path, numbers):
    run_dir = tmp_path / "run"
    process = start(processes, run_dir, SETTINGS, 23, numbers, target=run_in_a_terminal_until_signals)
    assert end_of(process) == 0
    assert [path.name for path in run_folder.checkpoints_of(run_dir)][-1] == "step-00000023"
    checkpoint.load_checkpoint(run_folder.checkpoints_of(run_dir)[-1])
    assert losses(run_dir)[-1][0] == 23
    run(run_dir, SETTINGS)
    assert losses(run_dir) == uninterrupted


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_until_signals(tmp_path / "run", SETTINGS | {"max_steps": 5}, 3, [signal.SIGHUP])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert losses(tmp_path / "run")[-1][0] == 5


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_interrupts_at_once(tmp_path, first):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt):
        run_in_a_terminal_until_signals(tmp_path / "run", SETTINGS, 3, [first, signal.SIGTERM])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.slow
def test_a_disk_that_fills_up(processes, uninterrupted, tmp_path):
    """No file may grow beyond a limit, which metrics.jsonl meets in the middle of a line."""
    run_dir = tmp_path / "run"
    process = start(processes, run_dir, SETTINGS, 30_001, target=run_with_file_limit)
    assert end_of(process) == 0
    found = json.loads(run_dir.with_suffix(".error").read_text())
    assert found["errno"] is not None
    newest = run_folder.checkpoints_of(run_dir)[-1]
    assert f"last good checkpoint: {newest}" in found["text"]
    assert f"hgrn2 train --resume {run_dir}" in found["text"]
    assert (run_dir / "metrics.jsonl").stat().st_size == 30_001
    assert not list(run_dir.rglob(".tmp-*"))
    run(run_dir, SETTINGS)
    assert losses(run_dir) == uninterrupted
