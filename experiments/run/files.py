"""Writes files whole or not at all, and makes errors name the file that they are about."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` into an OSError that names it, whatever error a library raises.

    torch.save raises a RuntimeError when its file raises an OSError; safetensors and tokenizers raise errors of their
    own, which quote the system's error number. An error that has nothing to do with the disk passes unchanged.
    """
    try:
        yield
    except OSError as error:
        raise _named(error.errno, path, error) from error
    except Exception as error:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error.__context__, OSError):
            raise _named(error.__context__.errno, path, error.__context__) from error
        if quoted:
            raise _named(int(quoted[1]), path) from error
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a file of text beside its place and moves it there, so that no reader sees half of it.

    A link stays a link: the file that it leads to is replaced.

    Raises:
        OSError: the file, which it names, cannot be written; its earlier content is unchanged.
    """
    place = Path(os.path.realpath(path))
    part = place.with_name(f"{place.name}.part")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(place)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise _named(error.errno, path) from error


def _named(number: int | None, path: Path, error: OSError | None = None) -> OSError:
    name = error.filename if error is not None and error.filename is not None else str(path)
    return OSError(number, os.strerror(number) if number else str(error), name)
