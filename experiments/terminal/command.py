"""How a command ends: what a user's input can cause is one line and an exit code, a fault of ours is a traceback.

Every command's `main` is `in_order`, so that none has to think of it. This module imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NoReturn, Protocol

from experiments.terminal.signals import StoppedError, raise_instead
from tasks.errors import printable

PACKAGES = ("appo", "rewards", "tasks", "experiments")
LONGEST = 2000  # characters of an error that are shown
FAULT = "This is a fault of the program, not of what you asked for. Please report it: the lines above, and the command."
LESS_MEMORY = "use dtype=bfloat16, gradient_checkpointing=true, fewer prompts or a lower sampling.max_new_tokens"
OUT_OF_MEMORY, MISTAKE, UNSOUND, OUR_FAULT, DISK = 1, 2, 3, 70, 74  # exit codes; of signals it is 128 + number

Main = Callable[[Sequence[str]], int]


class Program(Protocol):
    """A command's `main`; without arguments it takes those of the command line."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


class UsageError(ValueError):
    """The command line is not as it should be."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line like any other error."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; `{self.prog} --help` lists what can be given")


def in_order(main: Main) -> Program:
    """Lets `main` end in an exit code, whatever happens in it."""

    @wraps(main)
    def ending_in_order(argv: Sequence[str] | None = None) -> int:
        raise_instead()
        try:
            code = main(_text(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()  # here, where a failure is still told
        except (Exception, KeyboardInterrupt) as error:  # SystemExit, of --help, passes
            return _told(error)
        return code

    return ending_in_order


def exit_code(error: BaseException) -> int | None:
    """The exit code that an error stands for; None for a fault of the program.

    An error class of our own that is a ValueError is about what was given; any other is about a run that cannot go on.
    """
    ours = type(error).__module__.partition(".")[0] in PACKAGES
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, StoppedError) else signal.SIGINT)
    if ours and isinstance(error, ValueError):
        return MISTAKE
    if ours or isinstance(error, FloatingPointError):
        return UNSOUND
    if isinstance(error, OSError):
        return DISK
    return OUT_OF_MEMORY if _out_of_memory(error) else None


def one_line(error: BaseException) -> str:
    """What an error says, on one line that no terminal obeys; of a file that cannot be used, its name first."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    text = " ".join(text.split()) or type(error).__name__
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def _text(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, all of them text: bytes that are no UTF-8 come from the system as halves of characters.

    A null character cannot come from a shell, but from a program that calls `main`; no file's name may hold one.
    """
    for argument in arguments:
        if "\0" in argument:
            raise UsageError(f"the argument {argument!r} holds a null character")
        if not argument.isprintable() and any("\ud800" <= c <= "\udfff" for c in argument):
            raise UsageError(f"the argument {argument!r} is not UTF-8")
    return arguments


def _told(error: BaseException) -> int:
    """Says what happened, in one line if it is no fault of ours; returns the exit code."""
    code = exit_code(error)
    if isinstance(error, BrokenPipeError):  # nobody reads on, as with `| head`: nothing to be said
        _end_stdout()
        return 141
    if isinstance(error, OSError):
        _end_stdout()
    if code is None:
        traceback.print_exception(error)
        print(FAULT, file=sys.stderr)
        return OUR_FAULT
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        advice = f"out of memory; {LESS_MEMORY}" if code == OUT_OF_MEMORY else one_line(error)
        print(f"error: {advice}", file=sys.stderr)
    return code


def _end_stdout() -> None:
    """Lets go of an output that cannot be written to, or Python would try once more at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # which takes seconds to load, and no error is one of its own
        return isinstance(error, MemoryError)
    from appo.lm.model import out_of_memory

    return out_of_memory(error)
