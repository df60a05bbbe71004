"""`hgrn2 train` in several processes: started by itself, and by torchrun."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from hgrn2.cli import main
from hgrn2.formats import run_folder
from hgrn2.train.metrics import read_metrics

ARGUMENTS = [
    "train", "--task", "parity", "--task-set", "length=16", "validation_examples=64", "--set", "hidden_size=16",
    "num_hidden_layers=1", "expand_ratio=8", "intermediate_size=16", "--batch-size", "8", "--validation-every", "0",
    "--device", "cpu", "--no-report", "--num-threads", "1",
]  # fmt: skip


def start(launcher, *arguments):
    command = [sys.executable, "-m", *launcher, *ARGUMENTS, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(run_dir, process):
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(r["kind"] == "train" for r in read_metrics(run_dir)):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_started_by_the_command(tmp_path):
    run_dir = tmp_path / "run"
    process = start(["hgrn2"], "--processes", 2, "--max-steps", 10**6, "--out", run_dir)
    wait_for_step(run_dir, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    # one rank speaks
    assert len(re.findall("stopped by SIGINT", err)) == 1
    assert len(re.findall("step 1 ", err)) == 1
    step = run_folder.step_of(run_folder.checkpoints_of(run_dir)[-1])
    assert main(["train", "--resume", str(run_dir), "--max-steps", str(step + 2)]) == 0
    assert read_metrics(run_dir)[-1]["step"] == step + 2


@pytest.mark.slow
def test_started_by_torchrun(tmp_path):
    run_dir = tmp_path / "run"
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "hgrn2"]
    process = start(launcher, "--max-steps", 3, "--out", run_dir)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [r["step"] for r in read_metrics(run_dir) if r["kind"] == "train"] == [1, 2, 3]
    assert err.count("step 1 ") == 1


@pytest.mark.slow
def test_several_machines(tmp_path):
    """The recipe for several machines, with two launchers on one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [
        "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "hgrn2",
    ]  # fmt: skip
    machines = [start(launcher, "--max-steps", 3, "--out", tmp_path / "run") for _ in range(2)]
    errors = [machine.communicate(timeout=180)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"] == [1, 2, 3]
    assert "".join(errors).count("step 1 ") == 1


@pytest.mark.slow
def test_a_killed_rank_ends_the_command(tmp_path):
    run_dir = tmp_path / "run"
    process = start(["hgrn2"], "--processes", 2, "--max-steps", 10**6, "--checkpoint-every", 1, "--out", run_dir)
    wait_for_step(run_dir, process)
    while not run_folder.checkpoints_of(run_dir):
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    last = max(int(pid) for pid in children.stdout.split())
    began_s = time.monotonic()
    os.kill(last, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began_s < 20
    assert process.returncode == 2
    assert "rank 1 ended unexpectedly" in err
    assert f"--resume {run_dir}" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ranks_stop_when_the_command_is_killed(tmp_path):
    run_dir = tmp_path / "run"
    process = start(["hgrn2"], "--processes", 2, "--max-steps", 10**6, "--checkpoint-every", 0, "--out", run_dir)
    wait_for_step(run_dir, process)
    process.kill()
    # its pipes close when the last rank has ended
    _, err = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in err
    assert run_folder.checkpoints_of(run_dir)


def test_refused_before_anything_starts(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--max-steps", "1"]
    assert main([*ARGUMENTS, *out, "--processes", "3"]) == 2
    assert "batch_size 8" in capsys.readouterr().err
    assert main([*ARGUMENTS, *out, "--processes", "0"]) == 2
    assert "--processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
