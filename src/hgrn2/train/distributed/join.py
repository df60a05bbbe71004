"""Join the ranks of a job, and leave it."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hgrn2.errors import UserError
from hgrn2.train.distributed.environment import RankEnvironment, rank_environment
from hgrn2.train.distributed.ranks import Ranks
from hgrn2.train.distributed.watch import Failure, Watch
from hgrn2.train.parallel import ONE_PROCESS, Parallel

# other machines may have to wait in a scheduler's queue, or import torch from a slow disk
JOIN_TIMEOUT_S = 300.0
# of an operation on tensors of all ranks
_TENSOR_TIMEOUT = datetime.timedelta(minutes=30)
# an error that follows from another rank's end may be faster than the news of it
_NEWS_S = 5.0


@contextlib.contextmanager
def joined(timeout_s: float = JOIN_TIMEOUT_S, place: RankEnvironment | None = None) -> Iterator[Parallel]:
    """Return a context that joins the job of this process, if it is one of several ranks.

    When one rank fails or is killed, all others end within seconds. Only the main rank shows the error: there the
    context raises it as a UserError. On other ranks, standard output and error of Python are discarded inside.

    Args:
        timeout_s: seconds to wait for the other ranks.
        place: place of this process; None to read it from the environment variables that torchrun sets.

    Yields:
        `ONE_PROCESS` outside a job.

    Raises:
        UserError: a rank is missing, or fails.
    """
    place = rank_environment() if place is None else place
    if place is None:
        yield ONE_PROCESS
        return
    with contextlib.ExitStack() as outputs:
        if place.rank:
            nowhere = outputs.enter_context(open(os.devnull, "w"))
            outputs.enter_context(contextlib.redirect_stdout(nowhere))
            outputs.enter_context(contextlib.redirect_stderr(nowhere))
        if torch.cuda.is_available() and place.local_rank < torch.cuda.device_count():
            # otherwise every rank would take some memory of the first GPU
            torch.cuda.set_device(place.local_rank)
        store = _meet(place, timeout_s)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("groups", store), rank=place.rank, world_size=place.num_ranks,
            timeout=_TENSOR_TIMEOUT,
        )  # fmt: skip
        if place.launcher is not None:
            threading.Thread(target=_stop_after, args=(place.launcher,), daemon=True).start()
        watch = Watch(store, place.rank, place.num_ranks, place.address)
        try:
            ranks = Ranks(place, watch)
            yield ranks
            # the main rank may still write its report
            ranks.wait_for_all()
        except BaseException as error:
            _end_after(error, watch, is_main=place.rank == 0)
            raise AssertionError("unreachable") from error
        # nothing is left to share; an error from here on is this rank's own
        watch.close()
        dist.destroy_process_group()


def _stop_after(launcher: int) -> None:
    """Ask this process to stop once its launcher is gone."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _meet(place: RankEnvironment, timeout_s: float) -> Store:
    """Return the store that all ranks share, once all are there."""
    timeout = datetime.timedelta(seconds=timeout_s)
    where = f"{place.address}:{place.port}"
    try:
        store: Store = TCPStore(
            place.address, place.port, None, place.rank == 0 and not place.has_store, timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if place.rank == 0 and not place.has_store:
            raise UserError(f"rank 0: cannot listen at {where} ({reason}); set MASTER_PORT to a free port") from None
        raise UserError(
            f"rank {place.rank}: cannot reach rank 0 at {where} within {timeout_s:g} s; start it, or correct "
            "MASTER_ADDR and MASTER_PORT",
            "unavailable",
        ) from None
    store = PrefixStore(f"hgrn2/{place.attempt}", store)
    store.set(f"here/{place.rank}", "")
    if place.rank == 0:
        deadline_s = time.monotonic() + timeout_s
        missing = list(range(1, place.num_ranks))
        while missing and time.monotonic() < deadline_s:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(0.01)
        store.set("missing", ",".join(map(str, missing)))
    try:
        missing_ranks = store.get("missing").decode()
    except RuntimeError:
        missing_ranks = "0"
    if missing_ranks:
        raise UserError(
            f"{len(missing_ranks.split(','))} of {place.num_ranks} ranks have not joined within {timeout_s:g} s: "
            f"{missing_ranks}; start them, with the same MASTER_ADDR and MASTER_PORT",
            "unavailable",
        )
    return store


def _end_after(error: BaseException, watch: Watch, *, is_main: bool) -> None:
    """Tell the other ranks, then raise the error to show; end the process on ranks that show none."""
    news = watch.failure
    if news is None and not isinstance(error, UserError | SystemExit | KeyboardInterrupt | MemoryError):
        # is it the consequence of another rank's end?
        news = watch.wait_for_failure(_NEWS_S)
    watch.end()
    is_own = news is None or (is_main and isinstance(error, UserError) and str(error) == news.message)
    if is_own:
        status = 2
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif not isinstance(error, UserError) and not _is_out_of_memory(error):
            # a bug: where it is helps to mend it
            if not is_main:
                traceback.print_exception(error, file=sys.__stderr__)
            status = 1
        is_quiet = isinstance(error, SystemExit | KeyboardInterrupt)
        code = error.code if isinstance(error, UserError) else "unavailable"
        message = "" if is_quiet else (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_main:
            watch.fail(Failure("", status, code))
            raise error
        watch.fail(Failure(_named(message, error), status, code))
        # at once: the main rank may wait for this one in a collective operation, which now fails
        os._exit(status)
    assert news is not None
    if not is_main:
        watch.show(news)
        os._exit(news.status)
    if not news.message:
        sys.exit(news.status)
    raise UserError(f"{news.message}{watch.advice}", news.code) from error


def _named(message: str, error: BaseException) -> str:
    if _is_out_of_memory(error):
        return f"out of memory on another rank ({message}); lower batch_size, or see hgrn2 info MODEL --gpus N"
    # an error that all ranks have needs no name of one
    return message if isinstance(error, UserError) or not message else f"{type(error).__name__}: {message}"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "DefaultCPUAllocator" in str(error)
