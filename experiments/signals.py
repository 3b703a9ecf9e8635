"""Stopping a run in good order."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any


class StoppedError(Exception):
    """The run was asked to stop by a signal, and did so in good order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Takes note of SIGINT and SIGTERM while a block runs; the second one ends it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            raise StoppedError(number)
        self.received = number
        print("\nfinishing this iteration; once more to stop at once", file=sys.stderr, flush=True)
