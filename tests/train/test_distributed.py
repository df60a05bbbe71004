"""Processes over gloo give the losses of one process, agree on errors and signals, and end together."""

import errno
import os
import signal
import time

import pytest
import torch

from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.train.display import PlainDisplay
from hgrn2.train.distributed import joined
from hgrn2.train.distributed.environment import RankEnvironment, rank_environment
from hgrn2.train.distributed.gradients import GradientSums
from hgrn2.train.metrics import read_metrics
from hgrn2.train.parallel import ONE_PROCESS
from hgrn2.train.runs import resume_language_run, resume_task_run, start_language_run, start_task_run
from hgrn2.train.settings import RunSettings
from tests.refusals import refuses
from tests.train.ranks import model_config, rank_server, run_ranks, several, tiny_run

TINY = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2, "validation_every": 4, "checkpoint_every": 3}
TEXT = {
    "max_steps": 6, "batch_size": 4, "seq_len": 24, "learning_rate": 1e-2, "warmup_steps": 1, "validation_every": 3,
    "validation_tokens": 500, "report": False,
    # steps then do not amplify the rounding of small gradients
    "eps": 1e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def processes():
    with rank_server() as context:
        yield context


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"document {index} " * (3 + index))
    return prepare([str(folder)], "bytes", folder / "prepared", progress=False).directory


def text_run(parallel, run_dir, data_dir, settings, resume=None, **model):
    data = PreparedData.open(data_dir)
    if resume is not None:
        return resume_language_run(
            resume, data, changes=settings, display=PlainDisplay(), parallel=parallel
        ).result.counters.step
    return start_language_run(
        run_dir, model_config(**model), TEXT | settings, data, data_settings={}, display=PlainDisplay(),
        parallel=parallel,
    ).result.counters.step  # fmt: skip


def task_run(parallel, run_dir, settings, resume=None):
    if resume is not None:
        return resume_task_run(resume, changes=settings, display=PlainDisplay(), parallel=parallel).result.counters.step
    options = {"length": 12, "validation_examples": 8}
    flat = {"max_steps": 6, "batch_size": 4, "validation_every": 3, "report": False, "learning_rate": 1e-2}
    found = RunSettings.from_flat(flat | settings, "parity", options)
    config = model_config(vocab_size=found.task.model_settings(found.options)["vocab_size"])
    return start_task_run(run_dir, config, found, display=PlainDisplay(), parallel=parallel).result.counters.step


def mismatch(parallel):
    parallel.check_same({"train": {"batch_size": 4, "learning_rate": 0.1}, "rank": {"is": parallel.rank}})


def full_disk(parallel):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        parallel.on_main(write)
    except OSError as error:
        raise UserError(str(error), "unwritable") from None


def curve(run_dir):
    keys = ("step", "tokens", "loss", "grad_norm", "val_loss")
    return [[r.get(k) for k in keys] for r in read_metrics(run_dir) if r["kind"] in ("train", "validation")]


# Muon multiplies in bfloat16
ERRORS = {"muon": 1e-4}


def assert_same_curve(found, wanted, error=1e-6):
    # the loss hardly changes where the norm of its gradient does
    norm_error = 100 * error
    assert len(found) == len(wanted) > 6
    for one, other in zip(found, wanted, strict=True):
        assert one[:2] == other[:2]
        for i, tolerance in ((2, error), (3, norm_error), (4, error)):
            assert one[i] == (pytest.approx(other[i], rel=tolerance, abs=tolerance) if other[i] else other[i])


# the settings of runs, and on several processes only
RUNS = {
    "packed": (text_run, {"grad_accumulation": 2}),
    "stream": (text_run, {"stream": True}),
    "frozen": (text_run, {"freeze": "model.layers.0.*", "unfreeze_every": 2, "unfreeze_threshold": 10.0}),
    "muon": (text_run, {"optimizer": "muon"}),
    "pieces": (text_run, {"context_parallel": 2}),
    "parity": (task_run, {}),
}


SHARDED = {
    "sharded": {"grad_accumulation": 2},
    "kept": {"reshard": False, "activation_checkpointing": True},
    "muon": {"optimizer": "muon"},
    "low": {"precision": "bfloat16"},
    "pieces": {"context_parallel": 2},
}


def test_split_weights_give_the_losses_of_one_process(processes, data_dir, tmp_path):
    def calls(place, last=None, **also):
        found = []
        for name, settings in SHARDED.items():
            if last is None:
                found.append((text_run, (place / name, data_dir, settings | also), {"tie_word_embeddings": True}))
            else:
                found.append((text_run, (place / name, data_dir, {"max_steps": last}), {"resume": place / name}))
        return found

    (tmp_path / "two").mkdir()
    refused = (task_run, (tmp_path / "parity", {"shard": True}), {})
    begun = run_ranks(processes, several, [*calls(tmp_path / "two", shard=True), refused])
    assert [outcome.result[: len(SHARDED)] for outcome in begun] == [[6] * len(SHARDED)] * 2
    assert begun[0].result[-1][0] == "unsupported"
    for run, arguments, keywords in calls(tmp_path / "one"):
        run(ONE_PROCESS, *arguments, **keywords)
    # the same folders and files: one process continues what two began, and two what one began
    for run, arguments, keywords in calls(tmp_path / "two", 9):
        assert run(ONE_PROCESS, *arguments, **keywords) == 9
    more = [(run, (a, b, c | {"shard": True}), keywords) for run, (a, b, c), keywords in calls(tmp_path / "one", 9)]
    assert [outcome.result for outcome in run_ranks(processes, several, more)] == [[9] * len(SHARDED)] * 2
    for name in SHARDED:
        error = {"muon": 1e-4, "low": 1e-2}.get(name, 1e-6)
        assert_same_curve(curve(tmp_path / "two" / name), curve(tmp_path / "one" / name), error)


def test_two_processes_give_the_losses_of_one(processes, data_dir, tmp_path):
    def calls(place, later):
        found = []
        for name, (run, settings) in RUNS.items():
            data = () if run is task_run else (data_dir,)
            resume = {"resume": place / name} if later else {}
            found.append((run, (place / name, *data, {"max_steps": 9} if later else settings), resume))
        return found

    (tmp_path / "two").mkdir()
    refused = [
        (mismatch, (), {}),
        (full_disk, (), {}),
        (text_run, (tmp_path / "odd", data_dir, {"batch_size": 3}), {}),
        (text_run, (tmp_path / "grows", data_dir, {"stream": True}),
         {"layers": ("hgrn2", "attention"), "mixers": {"attention": {"num_heads": 2}}}),
        (text_run, (tmp_path / "graph", data_dir, {"cuda_graph": True}), {}),
        (text_run, (tmp_path / "mesh", data_dir, {"context_parallel": 3}), {}),
        (text_run, (tmp_path / "cut", data_dir, {"context_parallel": 2, "seq_len": 25, "batch_size": 1}), {}),
        (text_run, (tmp_path / "flow", data_dir, {"context_parallel": 2, "stream": True}), {}),
        (task_run, (tmp_path / "other", {"context_parallel": 2}), {}),
    ]  # fmt: skip
    begun = run_ranks(processes, several, [*calls(tmp_path / "two", False), *refused])
    steps = [6] * len(RUNS)
    for outcome in begun:
        assert outcome.status == 0
        assert outcome.result[: len(RUNS)] == steps
        errors = outcome.result[len(RUNS) :]
        wanted = [
            "mismatch",
            "unwritable",
            "contradiction",
            "unsupported",
            "unsupported",
            "contradiction",
            "contradiction",
        ]
        assert [code for code, _ in errors] == [*wanted, "unsupported", "unsupported"]
        assert "rank.is" in errors[0][1]
        assert "No space" in errors[1][1]
        assert "batch_size 3" in errors[2][1]
    assert not (tmp_path / "odd").exists()
    for run, arguments, keywords in calls(tmp_path / "one", False):
        run(ONE_PROCESS, *arguments, **keywords)
    for name in RUNS:
        assert_same_curve(curve(tmp_path / "two" / name), curve(tmp_path / "one" / name), ERRORS.get(name, 1e-6))
    # one process continues what two began, and two what one began
    for run, arguments, keywords in calls(tmp_path / "two", True):
        assert run(ONE_PROCESS, *arguments, **keywords) == 9
    continued = run_ranks(processes, several, calls(tmp_path / "one", True))
    assert [outcome.result for outcome in continued] == [[9] * len(RUNS)] * 2
    for name in RUNS:
        assert_same_curve(curve(tmp_path / "two" / name), curve(tmp_path / "one" / name), ERRORS.get(name, 1e-6))


@pytest.mark.slow
def test_pairs_of_ways_to_share_on_four_processes(processes, data_dir, tmp_path):
    settings = {"max_steps": 8, "batch_size": 8, "grad_accumulation": 2}
    text_run(ONE_PROCESS, tmp_path / "one", data_dir, settings)
    pairs = {
        "batch": {"context_parallel": 2},
        "shard": {"context_parallel": 2, "shard": True},
        "all": {"context_parallel": 4},
    }
    calls = [(text_run, (tmp_path / name, data_dir, settings | pair), {}) for name, pair in pairs.items()]
    found = run_ranks(processes, several, calls, num_ranks=4)
    assert [outcome.result for outcome in found] == [[8] * len(pairs)] * 4
    for name in pairs:
        assert_same_curve(curve(tmp_path / name), curve(tmp_path / "one"))


@pytest.mark.slow
def test_resume_on_other_numbers_of_processes(processes, data_dir, tmp_path):
    one = tmp_path / "one"
    text_run(ONE_PROCESS, one, data_dir, {"batch_size": 12, "max_steps": 12})
    many = tmp_path / "many"
    run_ranks(processes, text_run, many, data_dir, {"batch_size": 12, "max_steps": 12, "max_time_s": None}, num_ranks=4)
    assert_same_curve(curve(many), curve(one))
    for num_ranks, last in ((1, 15), (2, 18), (3, 21)):
        for run_dir in (one, many):
            if num_ranks == 1 or run_dir == one:
                text_run(ONE_PROCESS, run_dir, data_dir, {"max_steps": last}, resume=run_dir)
            else:
                found = run_ranks(
                    processes, resumed, run_dir, data_dir, {"max_steps": last}, num_ranks=num_ranks
                )  # fmt: skip
                assert [outcome.result for outcome in found] == [last] * num_ranks
        assert_same_curve(curve(many), curve(one))


def resumed(parallel, run_dir, data_dir, settings):
    return text_run(parallel, run_dir, data_dir, settings, resume=run_dir)


def test_a_signal_of_one_rank_stops_all(processes, tmp_path):
    tiny_run(ONE_PROCESS, tmp_path / "one", TINY)
    found = run_ranks(processes, tiny_run, tmp_path / "two", TINY, 1, 5, signal.SIGTERM)
    assert [(outcome.status, outcome.result) for outcome in found] == [(0, "SIGTERM")] * 2
    assert run_folder.checkpoints_of(tmp_path / "two")[-1].name == "step-00000006"
    tiny_run(ONE_PROCESS, tmp_path / "two", TINY, resume=True)
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(processes, tmp_path, rank):
    tiny_run(ONE_PROCESS, tmp_path / "one", TINY)
    began_s = time.monotonic()
    found = run_ranks(processes, tiny_run, tmp_path / "two", TINY, rank, 7, signal.SIGKILL)
    assert time.monotonic() - began_s < 20
    assert found[rank].status == -signal.SIGKILL
    assert found[1 - rank].status not in (0, None)
    if rank:
        text, code = found[0].error
        assert code == "unavailable"
        assert "rank 1" in text
        assert f"--resume {tmp_path / 'two'}" in text
    tiny_run(ONE_PROCESS, tmp_path / "two", TINY, resume=True)
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))


@pytest.mark.slow
def test_ranks_killed_at_random_moments(processes, tmp_path):
    tiny_run(ONE_PROCESS, tmp_path / "one", TINY | {"max_steps": 60})
    generator = torch.Generator().manual_seed(int(time.time()))
    settings, resume = TINY | {"max_steps": 60}, False
    for _ in range(10):
        rank = int(torch.randint(4, (), generator=generator))
        step = int(torch.randint(1, 12, (), generator=generator))
        done = run_folder.checkpoints_of(tmp_path / "four")
        at = step + (run_folder.step_of(done[-1]) if done else 0)
        found = run_ranks(
            processes, resumable, tmp_path / "four", settings, rank, at, signal.SIGKILL, resume, num_ranks=4
        )
        assert all(outcome.status is not None for outcome in found), "a rank is left over"
        resume = bool(run_folder.checkpoints_of(tmp_path / "four"))
    tiny_run(ONE_PROCESS, tmp_path / "four", settings, resume=resume)
    assert_same_curve(curve(tmp_path / "four"), curve(tmp_path / "one"))


def resumable(parallel, run_dir, settings, rank, at, number, resume):
    return tiny_run(parallel, run_dir, settings, rank, at, number, resume=resume)


def test_an_error_of_one_rank_is_shown_by_the_main_one(processes, tmp_path):
    found = run_ranks(processes, tiny_run, tmp_path / "two", TINY, 1, 2, 0)
    assert [outcome.status for outcome in found] == [2, 2]
    text, code = found[0].error
    assert code == "not-found"
    assert "no more data" in text


def test_a_missing_rank_is_named():
    place = RankEnvironment(0, 3, 0, "127.0.0.1", 0)
    with refuses("unavailable", "1,2", "2 of 3"), joined(0.2, place):
        pass
    nowhere = RankEnvironment(1, 2, 1, "127.0.0.1", 1)
    with refuses("unavailable", "127.0.0.1:1"), joined(0.2, nowhere):
        pass


def test_environment_of_torchrun():
    assert rank_environment({}) is None
    # a scheduler's variable alone makes no job
    assert rank_environment({"WORLD_SIZE": "8"}) is None
    full = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    assert rank_environment(full) == RankEnvironment(3, 4, 1, "node", 29500)
    assert rank_environment(full | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert rank_environment(full | {"TORCHELASTIC_RUN_ID": "hgrn2-41"}).launcher == 41
    assert rank_environment(full | {"TORCHELASTIC_RUN_ID": "41"}).launcher is None
    with refuses("incomplete", "MASTER_PORT"):
        rank_environment({name: value for name, value in full.items() if name != "MASTER_PORT"})
    with refuses("contradiction", "RANK", "4"):
        rank_environment(full | {"RANK": "4"})
    with refuses("invalid-value", "RANK", "x"):
        rank_environment(full | {"RANK": "x"})


def sums_of_gradients(parallel):
    """Sums with a parameter that no rank uses, one that one rank uses, and buckets of one parameter."""
    a, b, c = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(3))
    sums = GradientSums([a, b, c], bucket_bytes=1)
    (a * 2).sum().backward()
    sums.begin()
    loss = (a * (1 + parallel.rank)).sum() + (0 if parallel.rank else (b * 5).sum())
    loss.backward()
    sums.finish()
    return a.grad.tolist(), b.grad.tolist(), c.grad, os.getpid()


def test_gradients_are_summed(processes):
    found = run_ranks(processes, sums_of_gradients)
    assert [outcome.result[:3] for outcome in found] == [([7.0] * 4, [5.0] * 4, None)] * 2
