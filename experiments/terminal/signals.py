"""Stops a command cleanly on SIGINT or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from experiments.terminal import job

TWICE = 2.0  # seconds in which two signals under torchrun count as one


class StoppedError(KeyboardInterrupt):
    """A signal asked the command to stop. Like a Ctrl-C, no `except Exception` catches this error."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def end_at_once() -> None:
    """Lets SIGINT and SIGTERM end the process without a traceback, while a command is being loaded or has returned."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


@contextmanager
def raising() -> Iterator[None]:
    """Undoes `end_at_once`, if it was called, while a block runs: SIGINT and SIGTERM raise StoppedError."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is _end]
    for number in numbers:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _end)


def _raise(number: int, frame: object) -> None:
    raise StoppedError(number)


def _end(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")  # an import may be half done, so use as little of Python as possible
    os._exit(128 + number)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the process without a traceback, while a block imports slow modules."""
    numbers = (signal.SIGINT, signal.SIGTERM) if _may_handle() else ()
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _may_handle() -> bool:
    """Whether this is the main thread, the only one in which Python can set handlers."""
    return threading.current_thread() is threading.main_thread()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Signals:
    """Notes a first SIGINT or SIGTERM while a block runs; a second one raises StoppedError at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun: two signals within two seconds count
    as one.

    Args:
        say: shows a line to the user.
    """

    def __init__(self, say: Callable[[str], None] = _print) -> None:
        self.received = 0
        self._at = 0.0  # time of the first signal
        self._say = say
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if _may_handle():
            self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received and (job.size() == 1 or now > self._at + TWICE):
            raise StoppedError(number)
        if self.received:
            return
        self.received, self._at = number, now
        with suppress(RuntimeError):  # the signal came during another print
            self._say("finishing this iteration; press Ctrl-C again to stop at once")
