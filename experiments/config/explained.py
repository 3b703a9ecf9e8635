"""Shows every key of a configuration: its value, where the value comes from, and what the key means.

The meanings are the comments at the fields of the dataclasses; they are written nowhere else.
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

LEGEND = "[P]: the paper (arXiv 2410.07652). [TRL]: the defaults of TRL 0.11, which the published code used."


def explained(config: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """Yields two lines for every key: value and origin, then the meaning; at the end a legend.

    Args:
        config: the configuration.
        origins: dotted key -> where its value comes from; other keys have their defaults.
    """
    meaning = meanings(RunConfig)
    for key, value in flat(to_dict(config)).items():
        yield f"{printable(f'{key}={as_written(value)}'):<50}  # {origins.get(key, 'default')}"
        yield f"    {meaning[key]}"
    yield f"\n{LEGEND}"


def as_written(value: Any) -> str:
    """Returns a value as one writes it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def meanings(cls: Any, prefix: str = "") -> dict[str, str]:
    """Returns the comment at each field of a dataclass and of nested dataclasses, by the field's dotted name."""
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
