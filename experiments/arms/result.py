"""What every arm's result says: its scores beside the manual prompt's, and what is needed to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.run.run import Run
from experiments.run.statistics import compared, interval
from tasks.spec import SPLITS

NO_BETTER = "no prompt better than the manual one was found"


def scores(best: Mapping[str, Tensor], manual: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means, intervals and verdict of the result and the manual prompt; the arguments map splits to row values."""
    same = torch.equal(best["validation"], manual["validation"]) and torch.equal(best["test"], manual["test"])
    found: dict[str, Any] = {}
    for split in SPLITS[1:]:
        found |= split_scores(split, best[split], manual[split])
    found["verdict"] = NO_BETTER if same else compared(best["test"].tolist(), manual["test"].tolist())
    return found


def split_scores(split: str, best: Tensor, manual: Tensor) -> dict[str, Any]:
    """Rows, means and intervals of the result and the manual prompt on one split, from their row values."""
    found: dict[str, Any] = {f"{split}_rows": len(best)}
    for name, values in ((split, best), (f"manual_{split}", manual)):
        found[f"{name}_score"] = values.mean().item()
        found[f"{name}_interval"] = interval(values.tolist())
    return found


def described(run: Run) -> dict[str, Any]:
    """What else is needed to use a result."""
    spec = run.data.spec
    return {
        "task": spec.name,
        "mode": run.config.mode,
        "template": spec.template,
        "verbalizer": spec.verbalizer,
        "metric": run.reward.metric,
        "target": run.config.target,
        "seed": run.config.seed,
        "manual_prompt": spec.manual_prompt,
        "fingerprint": run.fingerprint,
    }
