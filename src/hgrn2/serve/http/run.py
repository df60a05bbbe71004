"""Start the server, and end it when a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from hgrn2.errors import UserError
from hgrn2.serve.http.app import make_app
from hgrn2.serve.http.options import ServerOptions
from hgrn2.serve.http.server import CompletionServer
from hgrn2.serve.text import TextEngine

# for the last chunks after the requests that still ran were ended
_LAST_SECONDS = 5


class HttpServer(uvicorn.Server):
    """uvicorn's server, which drains at the first SIGTERM or SIGINT and ends at the second.

    Args:
        engine: the engine with its tokenizer.
        options: options.

    Attributes:
        completions: what answers.

    Raises:
        UserError: as `CompletionServer`.
    """

    def __init__(self, engine: TextEngine, options: ServerOptions):
        self.completions = CompletionServer(engine, options)
        super().__init__(
            uvicorn.Config(
                make_app(self.completions), log_level="warning", access_log=False, server_header=False,
                limit_concurrency=options.max_connections, timeout_keep_alive=15, lifespan="on",
                timeout_graceful_shutdown=int(options.drain_seconds) + _LAST_SECONDS,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve_until_signal`; uvicorn would end the process by them after the drain."""
        yield

    async def serve_until_signal(self, listener: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until a signal comes and the requests have ended.

        Args:
            listener: a bound socket.
            on_ready: called once requests are answered.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Windows has no such handlers; Ctrl-C ends the loop there
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, self.drain)
        task = asyncio.ensure_future(self.serve([listener]))
        while not self.started and not task.done():
            await asyncio.sleep(0.01)
        if on_ready is not None and not task.done():
            on_ready()
        await task

    def drain(self) -> None:
        """Refuse new requests and end when those that run have ended; at once when called again."""
        self.force_exit = self.should_exit
        self.should_exit = self.completions.is_draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(self.completions.options.drain_seconds, self.completions.thread.cancel_all)


def listen(options: ServerOptions) -> socket.socket:
    """Return a bound socket.

    Raises:
        UserError: the address cannot be used.
    """
    listener = None
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UserError(
            f"{options.host} port {options.port}: {error.strerror}; choose another --host or --port", "in-use"
        ) from None
    return listener


def serve(engine: TextEngine, options: ServerOptions, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        engine: the engine with its tokenizer.
        options: options.
        on_ready: called with the address once requests are answered.

    Raises:
        UserError: the address cannot be used, or as `CompletionServer`.
    """
    server, listener = HttpServer(engine, options), listen(options)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    asyncio.run(server.serve_until_signal(listener, lambda: on_ready(url)))
