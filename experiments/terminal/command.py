"""How a command ends: with one line and an exit code for an error that input can cause, with a traceback for a bug.

The decorator `in_order` ensures this for the `main` of every command. This module imports nothing that loads slowly.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

from experiments.terminal.job import is_spokesman
from experiments.terminal.signals import StoppedError, raising
from tasks.errors import printable

PACKAGES = ("appo", "rewards", "tasks", "experiments", "__main__")  # the last: a command run by `python -m`
LONGEST = 2000  # most characters of an error to show
FAULT = "This is a bug in the program, not a mistake of yours. Please report it, with the command and the lines above."
LESS_MEMORY = "use dtype=bfloat16, gradient_checkpointing=true, fewer prompts or a lower sampling.max_new_tokens"
OUT_OF_MEMORY, MISTAKE, UNSOUND, OUR_FAULT, DISK = 1, 2, 3, 70, 74  # exit codes; for a signal: 128 + its number

Main = Callable[[Sequence[str]], int]


class Program(Protocol):
    """A command's `main`; without `argv` it takes the arguments of the command line."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


class UsageError(ValueError):
    """The command line is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like any other error.

    Args:
        prog: the command.
        doc: the docstring of its module, which becomes the help: the first paragraph says what the command does,
            indented paragraphs are examples, and all other paragraphs follow the examples.
        options: further arguments of argparse.ArgumentParser.
    """

    def __init__(self, prog: str, doc: str | None = None, **options: Any) -> None:
        if doc:
            first, *rest = doc.strip().split("\n\n")
            examples = [part for part in rest if part.startswith("    ")]
            told = "\n\n".join(part for part in rest if part not in examples)
            shown = "\n".join(["examples:", *examples]).replace("\n    ", "\n  ")
            options |= {"description": first, "epilog": f"{shown}\n\n{told}".strip()}
            options |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog, **options)

    def parse_mixed(self, argv: Sequence[str], *several: str) -> argparse.Namespace:
        """Parses arguments that hold key=value words anywhere; these become `assignments`.

        Args:
            argv: the arguments.
            several: names of options that take several words. argparse gives such an option all words that follow,
                key=value words included: these move to `assignments`. If the option is repeated, the last one counts.

        Raises:
            UsageError: an argument is wrong.
        """
        options = self.parse_intermixed_args(argv)
        for name in several:
            given = getattr(options, name) or [[]]
            options.assignments += [word for words in given for word in words if "=" in word]
            words = [word for text in given[-1] if "=" not in text for word in text.split()]
            if given[-1] and not words:
                raise UsageError(f"--{name}: expected a value before {given[-1][0]!r}")
            setattr(options, name, words)
        return options

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; `{self.prog} --help` lists what can be given")


def new_file(text: str) -> Path:
    """Checks the path of a file that a command writes at its end; serves as the type of such an option.

    Raises:
        argparse.ArgumentTypeError: the file cannot be written.
    """
    path = Path(text)
    place = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link is written through
    if place.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; expected a file")
    if os.path.lexists(place) and not place.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is a device, a pipe or the like; expected a file")
    if not place.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {str(place.parent)!r}")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: no permission in {str(place.parent)!r}")
    return path


def in_order(main: Main) -> Program:
    """Wraps `main` so that it returns an exit code, whatever it raises."""

    @wraps(main)
    def ending_in_order(argv: Sequence[str] | None = None) -> int:
        _make_writable()
        try:
            with raising():
                code = main(_text(sys.argv[1:] if argv is None else argv))
                sys.stdout.flush()  # here, where a failure is still reported
        except (Exception, KeyboardInterrupt) as error:  # SystemExit, from --help, passes
            return _told(error)
        return code

    return ending_in_order


def _make_writable() -> None:
    """Makes stdout and stderr take any text: escapes what their encoding lacks; a closed one (`>&-`) drops it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, TextIOWrapper) and not is_utf8(stream):
            stream.reconfigure(errors="backslashreplace")


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream can encode any text."""
    return (stream.encoding or "utf-8").lower().replace("-", "") == "utf8"


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code for an error; None for a bug in the program.

    A ValueError defined in this project means that the input is wrong. Any other error defined in it means that a run
    cannot go on.
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
    """Returns an error's message as one line, with control characters escaped; an OSError begins with its file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    text = " ".join(text.split()) or type(error).__name__
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def _text(arguments: Sequence[str]) -> Sequence[str]:
    """Returns the arguments; raises UsageError if one is not text.

    Bytes that are not UTF-8 arrive as surrogates. A null character, which no file name can hold, cannot come from a
    shell, but it can come from a program that calls `main`.
    """
    for argument in arguments:
        if "\0" in argument:
            raise UsageError(f"the argument {argument!r} holds a null character")
        if not argument.isprintable() and any("\ud800" <= c <= "\udfff" for c in argument):
            raise UsageError(f"the argument {argument!r} is not UTF-8")
    return arguments


def _told(error: BaseException) -> int:
    """Reports an error, in one line unless it is a bug; returns the exit code."""
    code = exit_code(error)
    if isinstance(error, BrokenPipeError):  # nobody reads on, as with `| head`: nothing to report
        _end_stdout()
        return 141
    if isinstance(error, OSError):
        _end_stdout()
    if not is_spokesman():
        return OUR_FAULT if code is None else code
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
    """Replaces a stdout that cannot be written to; otherwise Python would flush it again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:  # then the error is not torch's, and loading torch would take seconds
        return isinstance(error, MemoryError)
    from appo.lm.model import out_of_memory

    return out_of_memory(error)
