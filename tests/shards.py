"""Runs the tests in several processes side by side: `pytest --shards N`, by default for `pytest -m gpu` on a GPU.

Every process collects all tests, then runs the next one that no other process has claimed; each begins at another place
of the list, so that kernels of one kind are compiled in one process. This process prints what they report. pytest-xdist
does more; this needs nothing but pytest, as a machine with a GPU may have nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# of the compiler and of the GPU's driver; each process holds a context of half a GiB on the GPU
_MAX_SHARDS = 16
# below this, processes cost more than they bring
_FEW_TESTS = 16
_POLL_S = 0.1
_LOG_CHARACTERS = 3000
_NAMES = "names.json"
# memory that a process may keep for its next test; the others need some too
_KEPT_BYTES = 2 << 30
# exit status of a process whose GPU context is lost, as after an illegal access: every test after it would fail
_LOST_CONTEXT = 70


def add_options(parser: pytest.Parser) -> None:
    """Add the options, for `pytest_addoption`."""
    group = parser.getgroup("shards")
    group.addoption(
        "--shards", default="auto", help="processes that run the tests; auto: several for -m gpu on a GPU, otherwise 1"
    )
    # the parts of a shard's command line: the folder of claims and reports, and which shard this is
    group.addoption("--shard-folder", type=Path, help="(internal)")
    group.addoption("--shard", type=int, help="(internal)")
    group.addoption("--shard-count", type=int, help="(internal)")


def run_in_shards(session: pytest.Session) -> bool | None:
    """Run the collected tests, for `pytest_runtestloop`; None leaves them to pytest."""
    options = session.config.option
    if options.collectonly or (session.testsfailed and not options.continue_on_collection_errors):
        return None
    if options.shard_folder is not None:
        _Shard(session).run()
        return True
    count = _num_shards(session)
    if count < 2:
        return None
    with tempfile.TemporaryDirectory(prefix="shards-") as folder:
        _Runner(session, Path(folder), count).run()
    return True


def _num_shards(session: pytest.Session) -> int:
    options = session.config.option
    if options.shards != "auto":
        return int(options.shards)
    if options.markexpr != "gpu" or options.usepdb or len(session.items) < _FEW_TESTS or not _has_gpu():
        return 1
    return min(_MAX_SHARDS, os.cpu_count() or 1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _release_memory(kept_bytes: int) -> None:
    """Give the GPU memory back that torch keeps for later, if it is more than so many bytes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > kept_bytes:
        torch.cuda.empty_cache()


def _has_lost_context() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Shard:
    """One of the processes: claims tests, runs them and writes their reports, one JSON object a line."""

    def __init__(self, session: pytest.Session) -> None:
        options = session.config.option
        self._session, self._folder, self._index = session, options.shard_folder, options.shard
        self._has_failed = False
        # by name: what was collected here may be in another order
        names = json.loads((self._folder / _NAMES).read_text(encoding="utf-8"))
        items = {item.nodeid: item for item in session.items}
        if changed := [name for name in names if name not in items]:
            raise pytest.UsageError(f"{changed[0]}: this id differs between processes; give the parameters ids")
        self._items = [items[name] for name in names]
        first = self._index % options.shard_count * len(names) // options.shard_count
        self._order = [*range(first, len(names)), *range(first)]
        self._file = (self._folder / f"{self._index}.jsonl").open("a", encoding="utf-8")
        session.config.pluginmanager.register(self)

    def run(self) -> None:
        with self._file:
            self._run()

    def _run(self) -> None:
        unclaimed = filter(self._claim, self._order)
        current = next(unclaimed, None)
        while current is not None:
            # the next test decides which fixtures stay
            following = next(unclaimed, None)
            item, next_item = self._items[current], None if following is None else self._items[following]
            self._write(started=current)
            self._has_failed = False
            with self._alone() if item.get_closest_marker("large") else contextlib.nullcontext():
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
            self._write(finished=current)
            if self._has_failed and _has_lost_context():
                self._file.close()
                os._exit(_LOST_CONTEXT)
            _release_memory(_KEPT_BYTES)
            current = following

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        config = self._session.config
        self._has_failed = self._has_failed or report.failed
        self._write(report=config.hook.pytest_report_to_serializable(config=config, report=report))

    def _write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _claim(self, index: int) -> bool:
        try:
            with (self._folder / f"claim-{index}").open("x") as file:
                file.write(f"{self._index}")
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other process runs a test that takes much of the GPU's memory."""
        import fcntl

        with (self._folder / "large").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                _release_memory(0)


class _Runner:
    """Starts the processes, follows their reports, and starts another one for one that crashed."""

    def __init__(self, session: pytest.Session, folder: Path, count: int) -> None:
        self._session, self._folder, self._count = session, folder, count
        self._finished: set[int] = set()
        self._next_shard = 0
        self._shards: list[_Process] = []

    def run(self) -> None:
        names = [item.nodeid for item in self._session.items]
        (self._folder / _NAMES).write_text(json.dumps(names), encoding="utf-8")
        try:
            for _ in range(self._count):
                self._start()
            while any(shard.is_open for shard in self._shards):
                time.sleep(_POLL_S)
                for shard in [shard for shard in self._shards if shard.is_open]:
                    self._follow(shard)
        finally:
            for shard in self._shards:
                shard.process.kill()
                shard.process.wait()
        for index in sorted(set(range(len(self._session.items))) - self._finished):
            self._fail(index, "was not run by any process")

    def _start(self) -> None:
        self._shards.append(_Process(self._session.config, self._folder, self._next_shard, self._count))
        self._next_shard += 1

    def _follow(self, shard: _Process) -> None:
        ended = shard.process.poll() is not None
        config = self._session.config
        for entry in shard.read():
            if "report" in entry:
                report = config.hook.pytest_report_from_serializable(config=config, data=entry["report"])
                if isinstance(report.longrepr, list):
                    # why it was skipped, which JSON has no tuple for
                    report.longrepr = tuple(report.longrepr)
                config.hook.pytest_runtest_logreport(report=report)
            elif "started" in entry:
                shard.current = entry["started"]
            else:
                self._finished.add(entry["finished"])
                shard.current = None
                item = self._session.items[entry["finished"]]
                config.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            # -x and --maxfail
            if self._session.shouldfail:
                raise self._session.Failed(self._session.shouldfail)
        if ended:
            shard.is_open = False
            if shard.process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                self._replace(shard)

    def _replace(self, shard: _Process) -> None:
        """Report the test that ended a process, and leave the test it had claimed next to another process."""
        reason = f"process {shard.index} ended with status {shard.process.returncode}; the end of its output:\n"
        if shard.current is not None:
            self._fail(shard.current, reason + shard.output())
        elif shard.process.returncode != _LOST_CONTEXT:
            # not the fault of a test: others would end so too
            raise self._session.Interrupted(reason + shard.output())
        for claim in self._folder.glob("claim-*"):
            index = int(claim.name.removeprefix("claim-"))
            if index not in self._finished and claim.read_text() == str(shard.index):
                claim.unlink()
        if len(self._finished) < len(self._session.items):
            self._start()

    def _fail(self, index: int, reason: str) -> None:
        item = self._session.items[index]
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call")
        item.config.hook.pytest_runtest_logreport(report=report)
        self._finished.add(index)


class _Process:
    """A shard as its parent sees it."""

    def __init__(self, config: pytest.Config, folder: Path, index: int, count: int) -> None:
        self.index, self.is_open, self.current = index, True, None
        self._log, self._reports = folder / f"{index}.log", folder / f"{index}.jsonl"
        self._position = 0
        command = [sys.executable, "-m", "pytest", *map(str, config.invocation_params.args)]
        command += ["--shards=1", f"--shard-folder={folder}", f"--shard={index}", f"--shard-count={count}"]
        # Inductor has processes of its own, as many as there are cores
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=config.invocation_params.dir, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def read(self) -> Iterator[dict[str, Any]]:
        """The entries written since the last call."""
        if not self._reports.exists():
            return
        with self._reports.open("rb") as file:
            file.seek(self._position)
            # a last line may be incomplete
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole + newline)
        yield from map(json.loads, whole.splitlines())

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]
