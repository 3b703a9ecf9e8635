"""Whether a run's task is still what the run was made with: its rows, and of its spec what the numbers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from experiments.run.runlog import read_result
from tasks.spec import SPLITS
from tasks.splits import TaskData

Fingerprint = dict[str, str]  # part of the task -> hash


def fingerprint(data: TaskData) -> Fingerprint:
    """A hash of each part; other rows, another seed or another template give another."""
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
    """The parts that differ from what was written down before, by name; empty if none does."""
    known = before if isinstance(before, Mapping) else {}
    return ", ".join(name for name in now if known.get(name) != now[name])


def changed_since(folder: Path, now: Fingerprint) -> str:
    """The parts that are not as they were when a finished run was made; empty if all are, or if it did not say."""
    return differing(read_result(folder).get("fingerprint", now), now)
