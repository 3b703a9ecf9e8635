"""Every key of a configuration as readable text: its value, the value's source, and the key's meaning.

The meanings are the comments beside the fields of the dataclasses; they are written there only.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import tokenize
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config import RunConfig, flat, to_dict
from tasks.errors import printable

LEGEND = "[P]: the paper (arXiv 2410.07652). [TRL]: TRL 0.11, with whose defaults the published code ran."


def explained(config: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """Two lines for every key: value and origin, then the meaning; in the end what the short names stand for.

    Args:
        config: the values.
        origins: dotted key -> where its value comes from; a key that is not in it has its default.
    """
    meaning = meanings(RunConfig)
    for key, value in flat(to_dict(config)).items():
        yield f"{printable(f'{key}={as_written(value)}'):<50}  # {origins.get(key, 'default')}"
        yield f"    {meaning[key]}"
    yield f"\n{LEGEND}"


def as_written(value: Any) -> str:
    """A value as it is given on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def meanings(cls: Any, prefix: str = "") -> dict[str, str]:
    """The comment beside each field of a dataclass and of those in it, by the field's dotted name."""
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (tree,) = ast.parse(source).body
    lines = {ast.unparse(node.target): node.end_lineno for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    found: dict[str, str] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= meanings(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = comments[lines[name] or 0]
    return found
