"""Treat SIGINT, SIGTERM and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Windows has none
_SIGHUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `signal_name`; a further SIGINT or SIGTERM interrupts.

    An ignored SIGHUP, as under nohup, stays ignored. Outside the main thread, where Python handles no signals, it does
    nothing.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
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
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
        # a closing terminal sends SIGHUP more than once: only the first counts
        elif number != _SIGHUP:
            raise KeyboardInterrupt
