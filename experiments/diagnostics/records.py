"""Runs as data: a JSON object for each run of a study, with everything that the tables need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import INCIDENTAL, flat, to_dict
from experiments.config.strict import read_yaml
from experiments.diagnostics.results import arm_of
from experiments.run.folder import CONFIG, METRICS, PROMPTS, RESULT, finished, read_optional, stored_config
from tasks.catalogue import load_spec

DIGITS = 3  # decimals of the scores of a curve
LEFT_OUT = {*INCIDENTAL, "threads", "seed", "agent", "target", "data"}  # stored elsewhere in the record, or paths
RESULTS = (
    *("chosen", "prompt", "validation_rows", "validation_score"),
    *("test_rows", "test_score", "test_interval", "manual_test_score", "p"),
)
Record = dict[str, Any]


def record_of(folder: Path, study: str, labels: Mapping[str, str]) -> Record:
    """Returns what a run did and found; an unfinished run has no scores on validation and test.

    Args:
        folder: the run's folder.
        study: the name of the study.
        labels: axis -> setting of this run.

    Raises:
        RunFolderError, ConfigError: the folder holds no run, or one of its files is damaged.
    """
    config = stored_config(folder)
    result = finished(folder)[1] if (folder / RESULT).is_file() else {}
    spec, rows = load_spec(config.task), read_optional(folder / METRICS)
    scores = [row[f"{spec.metric}_mean"] for row in rows]
    decisions = [row["anchor"] for row in rows]
    distances = [row.get("kl") for row in rows]  # arm edits has none: it does not sample whole prompts
    named = {name: Path(getattr(config, name)).name for name in ("agent", "target")}
    chosen = flat(to_dict(config)).items()
    environment = read_yaml(folder / CONFIG).get("environment", {})
    return {
        "study": study,
        "labels": dict(labels),
        "seed": config.seed,
        "task": spec.name,
        "arm": arm_of(config),
        **named,
        "iterations": len(rows),
        "prompts": len(read_optional(folder / PROMPTS)),
        "answers": round(sum(row["answers"] for row in rows)),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "metric": spec.metric,
        "curve": [None if score is None else round(score, DIGITS) for score in scores],
        "kl": [None if kl is None else round(kl, 1) for kl in distances],
        "promoted": decisions.count("promote"),
        "rolled_back": decisions.count("rollback"),
        **{name: result.get(name) for name in RESULTS},
        "commit": environment.pop("commit", None),
        "environment": environment,
        "config": {key: value for key, value in chosen if key not in LEFT_OUT},
    }


def mean(values: Sequence[float | None]) -> float:
    """Returns the mean of the values that are not None; NaN if there are none."""
    real = [value for value in values if value is not None]
    return sum(real) / len(real) if real else math.nan
