"""Treat SIGINT, SIGTERM and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

# Windows has none
_SIGHUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


_requested: list[str] = []


def request_stop(signal_name: str) -> None:
    """Ask every run of this process that trains outside the main thread to stop after its step.

    Args:
        signal_name: name of the signal that the main thread has received.
    """
    _requested.append(signal_name)


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `signal_name`; a further SIGINT or SIGTERM interrupts.

    An ignored SIGHUP, as under nohup, stays ignored. Outside the main thread, where Python handles no signals,
    `signal_name` is that of the first `request_stop`.

    Args:
        repeat_s: seconds after the first signal within which a further one counts as the same request.
    """

    def __init__(self, repeat_s: float = 0.0) -> None:
        self._repeat_s = repeat_s
        self._first_s = 0.0
        self._own_name: str | None = None
        self._is_main = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that asks to stop; None before it."""
        if self._is_main:
            return self._own_name
        return _requested[0] if _requested else None

    def __enter__(self) -> StopRequest:
        if self._is_main:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if _SIGHUP is not None and signal.getsignal(_SIGHUP) is not signal.SIG_IGN:
                numbers.append(_SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._own_name is None:
            self._own_name = signal.Signals(number).name
            self._first_s = time.monotonic()
        # a closing terminal sends SIGHUP more than once: only the first counts
        elif number != _SIGHUP and time.monotonic() - self._first_s >= self._repeat_s:
            raise KeyboardInterrupt
