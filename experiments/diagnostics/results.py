"""Runs side by side: a row for each, read from its folder, and all rows as a CSV file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.config import REFERENCES, RunConfig
from experiments.run.files import write_whole
from experiments.run.fingerprint import Fingerprint
from experiments.run.folder import METRICS, RESULT, finished, read_optional, stored_config
from tasks.catalogue import load_spec

NOT_THE_TEST = {"train rows", "validation rows", "manual prompt"}  # parts of a fingerprint that do not alter the test
UNFINISHED = "unfinished"
COPIED = (  # from the result into the row, under the same name
    *("task", "metric", "test_rows", "test_score", "manual_test_score", "validation_rows", "validation_score"),
    *("chosen", "verdict"),
)


@dataclass(frozen=True)
class RunRow:
    """What a run did and found; scores are None if the run is not finished."""

    run: str
    task: str
    mode: str
    arm: str
    agent: str
    target: str
    seed: int
    steps: int  # iterations done
    finished: bool
    metric: str | None = None
    test_rows: int | None = None
    test_score: float | None = None
    test_low: float | None = None  # ends of the 95 % interval
    test_high: float | None = None
    manual_test_score: float | None = None
    manual_test_low: float | None = None
    manual_test_high: float | None = None
    validation_rows: int | None = None
    validation_score: float | None = None
    chosen: str | None = None  # kind of the result: manual, tuned, few-shot, edits, ...
    verdict: str = UNFINISHED
    test: str | None = None  # short name of the test; runs that were scored on the same test have the same name


def scored(score: float | None, low: float | None, high: float | None, rows: int | None) -> str:
    """Returns a score with its interval and number of rows; "" for a run that is not finished."""
    if score is None or low is None or high is None:
        return ""
    return f"{score:.3f} ({low:.3f} to {high:.3f}, n = {rows})"


def read_row(folder: Path) -> RunRow:
    """Returns the row of a run, finished or not.

    Raises:
        RunFolderError, ConfigError: the folder holds no run, or one of its files is damaged.
        TaskError: the run is not finished, and its task is unknown here.
    """
    config = stored_config(folder)
    steps = len(read_optional(folder / METRICS))
    begun: dict[str, Any] = {name: getattr(config, name) for name in ("mode", "agent", "target", "seed")}
    begun |= {"run": str(folder), "arm": arm_of(config), "steps": steps}
    if not (folder / RESULT).is_file():
        spec = load_spec(config.task)
        return RunRow(**begun, task=spec.name, metric=spec.metric, finished=False)
    _, result = finished(folder)
    ends = [("test_low", "test_high"), ("manual_test_low", "manual_test_high")]
    intervals = zip(ends, (result["test_interval"], result["manual_test_interval"]), strict=True)
    return RunRow(
        **begun,
        **{name: end for names, found in intervals for name, end in zip(names, found, strict=True)},
        **{name: result[name] for name in COPIED},
        finished=True,
        test=_test(result.get("fingerprint")),
    )


def arm_of(config: RunConfig) -> str:
    """Returns the name of a run's arm, as in `appo compare --arms`."""
    arm: str = config.arm
    if arm == "appo":  # with another reference it is another arm
        arm = next((name for name, other in REFERENCES.items() if other == config.appo.reference), arm)
    if config.mode == "tte":
        return {"appo": "tte", "frozen": "tte-untrained"}.get(arm, f"tte, {arm}")
    return arm


def _test(fingerprint: Fingerprint | None) -> str:
    """Returns a short name for the test of a run: its rows, and how they are shown to the target."""
    parts = {name: hashed for name, hashed in (fingerprint or {}).items() if name not in NOT_THE_TEST}
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:8]


def grouped(rows: Sequence[RunRow]) -> list[list[RunRow]]:
    """Groups rows whose scores can be compared; an unfinished run joins the first group of its task."""
    groups: list[list[RunRow]] = []
    for row in sorted(rows, key=lambda row: not row.finished):  # the sort keeps the order of equals
        like = (group for group in groups if _comparable(group[0], row))
        group = next(like, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _comparable(one: RunRow, other: RunRow) -> bool:
    return one.task == other.task and (one.test == other.test or not (one.finished and other.finished))


def write_csv(path: Path, rows: Iterable[RunRow]) -> None:
    """Writes the rows as a CSV file with a header.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(RunRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_whole(path, text.getvalue())
