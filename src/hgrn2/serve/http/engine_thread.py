"""One thread that calls the engine, and the streams through which asyncio's handlers get what it writes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from hgrn2.errors import UserError
from hgrn2.serve.requests import Request
from hgrn2.serve.sessions import Session
from hgrn2.serve.text import TextEngine, TextEvent

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Part of a continuation.

    Attributes:
        prompt: number of the prompt among those submitted together.
        event: the token and its text.
        session: the session of the continuation, at its end and if it was to be kept.
    """

    prompt: int
    event: TextEvent
    session: Session | None = None


@dataclass(frozen=True)
class EngineState:
    """Counts of the engine after a step.

    Attributes:
        num_running: continuations that are decoded.
        num_waiting: requests whose prompts are not read.
        num_free_rows: rows without a state.
        num_rows: rows of the pool.
        num_prompt_tokens: tokens of prompts read.
        num_reused_tokens: tokens of prompts whose state was reused.
        prefix_bytes: bytes of the prefix cache.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_rows: int = 0
    num_rows: int = 0
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    prefix_bytes: int = 0


class Stream:
    """Pieces of the prompts of one HTTP request, in the order in which they are written.

    Args:
        num_open: continuations that have not ended.
    """

    def __init__(self, num_open: int):
        self.num_open = num_open
        self.loop = asyncio.get_running_loop()
        # numbers of the engine's requests; set by the engine's thread before the first piece
        self.numbers: list[int] = []
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def put(self, piece: Piece | Exception) -> None:
        """Add a piece, in the thread of the loop."""
        self._pieces.put_nowait(piece)

    async def next(self) -> Piece | None:
        """Return the next piece, None after the last.

        Raises:
            Exception: the engine failed.
        """
        if not self.num_open:
            return None
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            self.num_open = 0
            raise piece
        self.num_open -= piece.event.finish_reason is not None
        return piece


class EngineThread:
    """The thread of an engine.

    Args:
        engine: the engine, which only this thread calls from `start` on.

    Attributes:
        state: counts after the last step.
        failure: why the thread ended; None while it works.
    """

    def __init__(self, engine: TextEngine):
        self.engine = engine
        self.state = self._state()
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Stream, int]] = {}
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it; streams that are open raise an error."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread takes requests."""
        return self._thread.is_alive() and self.failure is None

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps of the engine, and return its result.

        Raises:
            UserError: the engine is not running.
            Exception: the function raised it.
        """
        future: Future[T] = Future()
        self._commands.put((function, future))
        # a thread that ended takes no commands
        if not self.is_alive:
            raise UserError(f"engine: not running ({self.failure!r}); start the server again", "unavailable")
        return await asyncio.wrap_future(future)

    async def submit(
        self, prompts: Sequence[Sequence[int]], request: Request, stop: Sequence[str], session: Session | None
    ) -> Stream:
        """Queue prompts with the same settings; all of them or none.

        Args:
            prompts: token ids of each.
            request: the settings.
            stop: texts that end a continuation.
            session: text that they continue; None for new ones.

        Raises:
            UserError: the engine refuses a request.
        """
        stream = Stream(len(prompts) * request.n)

        def run() -> None:
            try:
                for i, prompt in enumerate(prompts):
                    number = self.engine.submit(prompt, request, stop, session)
                    stream.numbers.append(number)
                    self._streams[number] = (stream, i)
            except Exception:
                self._cancel(stream)
                raise

        try:
            await self.call(run)
        except asyncio.CancelledError:
            # the client left before the engine took the request
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """End what runs of a stream; its pieces say so unless it has left."""
        self._commands.put((lambda: self._cancel(stream), Future()))

    def leave(self, stream: Stream) -> None:
        """End what runs of a stream that has no reader any more."""
        if stream.num_open:
            stream.num_open = 0
            self.cancel(stream)

    def cancel_all(self) -> None:
        """End all requests; their pieces say so."""
        self._commands.put((lambda: [self._cancel(stream) for stream, _ in list(self._streams.values())], Future()))

    async def pause(self, stream: Stream) -> dict[tuple[int, int], Session]:
        """End what runs of a stream, and return the sessions by prompt and continuation."""

        def run() -> dict[tuple[int, int], Session]:
            found = {}
            for i, number in enumerate(stream.numbers):
                for index in self.engine.running(number):
                    with contextlib.suppress(UserError):
                        # it may have ended in a step that ran ahead
                        found[i, index] = self.engine.engine.pause(number, index)
            self._cancel(stream)
            return found

        return await self.call(run)

    def _cancel(self, stream: Stream) -> None:
        for number in stream.numbers:
            self.engine.engine.cancel(number)

    def _run(self) -> None:
        # the settings of a thread are its own
        torch.set_num_threads(self._num_threads)
        torch.set_grad_enabled(False)
        device = self.engine.engine.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            while self._obey():
                self._deliver(self.engine.step())
                self.state = self._state()
        except Exception as error:
            self.failure = error
            self._fail(error)
            raise
        self.failure = UserError("the server has ended", "unavailable")
        self._fail(self.failure)

    def _obey(self) -> bool:
        """Carry out the commands that wait, at least one if the engine has nothing to do; return False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.engine.is_busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            function, future = command
            if not future.set_running_or_notify_cancel():
                # the client has left
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _deliver(self, events: Sequence[TextEvent]) -> None:
        found: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Piece]]] = {}
        for event in events:
            number = event.token.request_id
            if number not in self._streams:
                continue
            stream, prompt = self._streams[number]
            session = None
            if event.finish_reason is not None:
                session = self._take_session(event)
            found.setdefault(stream.loop, []).append((stream, Piece(prompt, event, session)))
        for number in {event.token.request_id for event in events if event.finish_reason is not None}:
            if not self.engine.running(number):
                self._streams.pop(number, None)
        for loop, pieces in found.items():
            _call(loop, _put_all, pieces)

    def _take_session(self, event: TextEvent) -> Session | None:
        try:
            return self.engine.session(event.token.request_id, event.token.index)
        except UserError:
            return None

    def _fail(self, error: Exception) -> None:
        for stream in {id(stream): stream for stream, _ in self._streams.values()}.values():
            _call(stream.loop, stream.put, error)
        self._streams.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None and command[1].set_running_or_notify_cancel():
                    command[1].set_exception(UserError("the server has ended", "unavailable"))

    def _state(self) -> EngineState:
        engine = self.engine.engine
        prefix_bytes = 0 if engine.prefixes is None else engine.prefixes.num_bytes
        return EngineState(
            engine.num_running, engine.num_waiting, engine.num_free_rows, engine.pool.num_rows,
            engine.num_prompt_tokens, engine.num_reused_tokens, prefix_bytes,
        )  # fmt: skip


def _put_all(pieces: Sequence[tuple[Stream, Piece]]) -> None:
    for stream, piece in pieces:
        stream.put(piece)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    # a loop that has ended has no readers
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
