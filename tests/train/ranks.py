"""Ranks of a job as processes forked from a server that has everything loaded, so that they start in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

import hgrn2
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.tasks.base import Metric
from hgrn2.train.display import PlainDisplay
from hgrn2.train.distributed import joined
from hgrn2.train.distributed.environment import RankEnvironment
from hgrn2.train.parallel import ONE_PROCESS
from hgrn2.train.run import RunSpec, resume_run, start_run
from hgrn2.train.settings import RunSettings
from tests.train.tiny_run import ROLES, TinyModel, TinyTask

MODEL = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}


@dataclass(frozen=True)
class Outcome:
    """The end of a rank: its exit status, and the result or the error (as a text with its code) of its function."""

    status: int | None
    result: Any = None
    error: tuple[str, str] | None = None


@contextmanager
def rank_server() -> Iterator[Any]:
    """Yield a context of multiprocessing whose processes have the package loaded."""
    folders = [str(Path(hgrn2.__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "tests.train.tiny_run", "tests.train.ranks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        first = context.Process(target=time.time)
        first.start()
        first.join()
        yield context


def run_ranks(
    context: Any, function: Callable[..., Any], *arguments: Any, num_ranks: int = 2, timeout_s: float = 60.0
) -> list[Outcome]:
    """Call function(parallel, *arguments) on every rank of a job; return how each ended.

    Args:
        context: from `rank_server`.
        function: of a module, so that it can be sent to another process.
        *arguments: values that can be pickled.
        num_ranks: number of processes.
        timeout_s: seconds after which the test fails.
    """
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    ranks = []
    for rank, (_, sender) in enumerate(pipes):
        place = RankEnvironment(rank, num_ranks, rank, "127.0.0.1", store.port, has_store=True)
        ranks.append(context.Process(target=_call, args=(sender, place, function, arguments)))
    for rank in ranks:
        rank.start()
    for _, sender in pipes:
        sender.close()
    deadline_s = time.monotonic() + timeout_s
    outcomes = []
    try:
        for rank, (receiver, _) in zip(ranks, pipes, strict=True):
            found: tuple[Any, Any] = (None, None)
            if receiver.poll(max(0.1, deadline_s - time.monotonic())):
                with suppress(EOFError):
                    found = receiver.recv()
            rank.join(max(0.1, deadline_s - time.monotonic()))
            outcomes.append(Outcome(rank.exitcode, *found))
        assert all(rank.exitcode is not None for rank in ranks), f"ranks hang: {outcomes}"
    finally:
        for rank in ranks:
            rank.kill()
    return outcomes


def _call(sender: Any, place: RankEnvironment, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with joined(30.0, place) as parallel:
            result = function(parallel, *arguments)
    except UserError as error:
        sender.send((None, (str(error), error.code)))
        sys.exit(2)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        raise
    sender.send((result, None))


class EndingTask(TinyTask):
    """A rank's rows of every batch; one rank gets a signal, or raises, when it reaches a batch."""

    name = "ending"
    metric = Metric("val_loss")
    splits_batches = True

    def __init__(self, config, parallel, rank=-1, position=-1, number=0):
        super().__init__(config)
        self.rank, self.num_ranks = parallel.rank, parallel.num_ranks
        self.ends = rank == parallel.rank
        self.at, self.number = position, number

    def next_batch(self):
        if self.ends and self.position == self.at:
            if not self.number:
                raise UserError("this rank has no more data", "not-found")
            os.kill(os.getpid(), self.number)
        ids, targets, position = super().next_batch()
        return ids[self.rank :: self.num_ranks], targets[self.rank :: self.num_ranks], position

    def evaluate(self, model):
        position, self.position = self.position, 10**6
        ids, targets, _ = TinyTask.next_batch(self)
        self.position = position
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        return {"val_loss": loss.item()}


class _Model(TinyModel):
    def parameter_roles(self):
        return ROLES


def tiny_run(parallel, run_dir, settings, *ends, resume=False):
    """Train the stand-in model; the run ends as `EndingTask` is told to."""
    flat = RunSettings.from_flat({"report": False, **settings})

    def spec_of(_):
        return RunSpec(
            flat,
            lambda device: _Model(dropout=0.0),
            lambda device: EndingTask(flat.train, parallel, *ends),
            {"model": {}, "data": {}},
        )

    if resume:
        return resume_run(run_dir, spec_of, PlainDisplay(), parallel).result.stopped_by
    return start_run(run_dir, spec_of(None), PlainDisplay(), parallel).result.stopped_by


def model_config(**changes):
    """The smallest real model."""
    return HGRN2Config(**{**MODEL, **changes})


def several(parallel, calls):
    """Call functions one after the other on the same ranks; the error of one does not end the job."""
    results = []
    for function, arguments, keywords in calls:
        try:
            results.append(function(parallel, *arguments, **keywords))
        except UserError as error:
            results.append((error.code, str(error)))
    return results


__all__ = ["ONE_PROCESS", "EndingTask", "Outcome", "model_config", "rank_server", "run_ranks", "several", "signal"]
