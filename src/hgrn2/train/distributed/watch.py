"""Notice when a rank ends before the others, and end them with its message.

A rank that waits for others in a collective operation does not see that one of them is gone: NCCL waits for its
timeout, and a Python signal handler does not run meanwhile. Every rank therefore keeps one TCP connection to the main
rank, which the system closes when the process ends, whatever the reason.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from hgrn2.errors import UserError

_ADDRESS_KEY = "watch/address"
# for the main thread to unwind after a failure elsewhere, before the process is ended
_GRACE_S = 3.0
_CONNECT_S = 5.0
# a machine that is switched off closes no connection
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class Failure:
    """The end of another rank.

    Attributes:
        message: error to show; empty if it was shown already.
        status: exit status.
        code: code of the `UserError`.
    """

    message: str
    status: int = 1
    code: str = "unavailable"


class Watch:
    """Connections between the main rank and all others.

    Args:
        store: key-value store that all ranks share.
        rank: number of this rank; 0 is the main one.
        num_ranks: number of ranks.
        address: host name of the store.

    Attributes:
        failure: the first failure of another rank; None as long as all are well.
        advice: how to continue after a failure; appended to its message.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, address: str) -> None:
        self.failure: Failure | None = None
        self.advice = ""
        self._rank, self._num_ranks = rank, num_ranks
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._unwound = threading.Event()
        self._others: dict[int, _Connection] = {}
        if rank == 0:
            self._listen(store, address)
        else:
            self._others[0] = _connect(store, rank)
            self._start(self._read, 0, self._others[0])

    def close(self) -> None:
        """Leave without alarming the others."""
        self._closing.set()
        self._send_all({"bye": True})
        self._unwound.set()

    def fail(self, failure: Failure) -> None:
        """Report an error of this rank: the main rank shows it, and all ranks end.

        Args:
            failure: the error; with an empty message if it needs no showing.
        """
        self._closing.set()
        # other ranks do not show what the main one does
        message = "" if self._rank == 0 else failure.message
        self._send_all({"failure": message, "status": failure.status, "code": failure.code})

    def wait_for_failure(self, timeout_s: float) -> Failure | None:
        """Wait until another rank has failed; None if none has."""
        self._changed.wait(timeout_s)
        return self.failure

    def end(self) -> None:
        """Keep the process from being ended: the caller ends it."""
        self._unwound.set()

    def _listen(self, store: Store, address: str) -> None:
        listener = socket.create_server(("", 0), backlog=self._num_ranks)
        token = secrets.token_hex(16)
        hosts = list(_own_hosts(address))
        store.set(_ADDRESS_KEY, json.dumps({"hosts": hosts, "port": listener.getsockname()[1], "token": token}))
        listener.settimeout(60.0)
        try:
            while len(self._others) < self._num_ranks - 1:
                connection = _Connection(listener.accept()[0])
                # anything else that reaches the port is turned away
                connection.socket.settimeout(_CONNECT_S)
                hello = connection.receive() or {}
                connection.socket.settimeout(None)
                rank = hello.get("rank")
                if hello.get("token") != token or not isinstance(rank, int):
                    connection.socket.close()
                    continue
                self._others[rank] = connection
                self._start(self._read, rank, connection)
        except TimeoutError:
            missing = sorted(set(range(1, self._num_ranks)) - self._others.keys())
            raise UserError(
                f"rank 0: no connection from ranks {missing} within 60 s; the ranks need TCP connections to "
                f"{' or '.join(hosts)}",
                "unavailable",
            ) from None
        finally:
            listener.close()

    def _start(self, work: Any, *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True, name="hgrn2-watch").start()

    def _read(self, rank: int, connection: _Connection) -> None:
        """Wait for the last message of another rank, or the end of its connection."""
        message = connection.receive()
        if message is None:
            self._found(Failure(f"rank {rank} ended unexpectedly: killed, out of memory, or its machine is gone"))
        elif "failure" in message:
            self._found(Failure(message["failure"], message["status"], message["code"]))

    def _found(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None or self._closing.is_set():
                return
            self.failure = failure
        if self._rank == 0:
            # the main rank shows it
            self._send_all({"failure": "", "status": failure.status, "code": failure.code})
        self._changed.set()
        if self._unwound.wait(_GRACE_S):
            return
        # the main thread waits for the device or a rank that is gone
        self.show(failure)
        os._exit(failure.status)

    def show(self, failure: Failure) -> None:
        """Print a failure, if this rank is the one to do so."""
        # rank 1 speaks for the main rank if that is gone
        if failure.message and self._rank < 2:
            _show_at_once(f"error: {failure.message}{self.advice}")

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self._others.values():
            with suppress(OSError):
                connection.send(message)


class _Connection:
    """Messages as lines of JSON."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._read = b""

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if the connection has ended."""
        while b"\n" not in self._read:
            try:
                found = self.socket.recv(4096)
            except OSError:
                return None
            if not found or len(self._read) > 2**20:
                return None
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None


def _connect(store: Store, rank: int) -> _Connection:
    place = json.loads(store.get(_ADDRESS_KEY))
    errors = []
    deadline_s = time.monotonic() + 30.0
    while time.monotonic() < deadline_s:
        for host in place["hosts"]:
            try:
                connected = socket.create_connection((host, place["port"]), _CONNECT_S)
            except OSError as error:
                errors.append(f"{host}: {error.strerror or error}")
                continue
            connected.settimeout(None)
            connection = _Connection(connected)
            connection.send({"rank": rank, "token": place["token"]})
            return connection
        time.sleep(0.2)
    raise UserError(
        f"rank {rank}: cannot connect to rank 0 ({'; '.join(dict.fromkeys(errors))}); open TCP ports between the "
        "machines",
        "unavailable",
    )


def _own_hosts(address: str) -> Iterable[str]:
    """Return names under which other machines may reach this one."""
    found = [address, socket.gethostname()]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # sends nothing: only asks for the interface
        probe.connect((address, 9))
        found.insert(0, probe.getsockname()[0])
    return dict.fromkeys(found)


def _show_at_once(line: str) -> None:
    with suppress(OSError, ValueError):
        # a progress display hides the cursor
        show_cursor = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
        print(f"{show_cursor}{line}", file=sys.__stderr__, flush=True)
