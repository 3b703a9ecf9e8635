"""Whether a task has changed since a run was made: its rows, and the parts of its spec that scores depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from experiments.run.folder import read_result
from tasks.spec import SPLITS
from tasks.splits import TaskData

Fingerprint = dict[str, str]  # part of the task -> hash


def fingerprint(data: TaskData) -> Fingerprint:
    """A hash of each part of the task; the hashes of rows also change with the seed that draws them."""
    spec = data.spec
    parts = {
        "template": spec.template,
        "manual prompt": spec.manual_prompt,
        "metric": spec.metric,
        "label words": (list(spec.verbalizer.items()), data.words),
        **{f"{split} rows": getattr(data, split) for split in SPLITS},
    }
    return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}


def differing(before: object, now: Fingerprint) -> str:
    """The names of the parts that differ from the stored fingerprint `before`; empty if none does."""
    known = before if isinstance(before, Mapping) else {}
    return ", ".join(name for name in now if known.get(name) != now[name])


def changed_since(folder: Path, now: Fingerprint) -> str:
    """The names of the parts that changed since a finished run was made; empty if none did, or it stored no hashes."""
    return differing(read_result(folder).get("fingerprint", now), now)
