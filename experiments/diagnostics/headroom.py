"""Checks before training whether prompts matter to this target on this task, and how much there is to gain.

Scores the manual prompt, the empty prompt and some prompts of the untrained agent on the validation rows. If these
scores differ by no more than chance, training has little to gain, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from experiments.arms.choice.result import chance
from experiments.arms.fixed import meta_query
from experiments.diagnostics.records import mean
from experiments.run.run import Run, stream
from experiments.run.statistics import LEVEL, NO_VERDICT, Interval, interval, spread

TOO_FEW = "one prompt was sampled, which tells nothing of how prompts differ; raise headroom"


@dataclass(frozen=True)
class Headroom:
    """Scores on the validation rows, all by the task's metric.

    Attributes:
        metric, rows: the metric, and the number of rows.
        chance: score of the best constant answer; 0 if answers are text.
        manual, manual_interval: score of the manual prompt, and its 95 % interval.
        empty: score of the empty prompt.
        sampled: scores of the agent's distinct prompts.
        spread, noise, p: standard deviation of the sampled scores, its expected size by chance alone, and the p-value
            of a permutation test of "prompts have no effect"; None for fewer than two distinct prompts.
        verdict: what these numbers mean, in words.
    """

    metric: str
    rows: int
    chance: float
    manual: float
    manual_interval: Interval
    empty: float
    sampled: list[float]
    spread: float | None
    noise: float | None
    p: float | None
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Returns the content of headroom.json."""
        return asdict(self) | {"lines": self.lines()}

    def lines(self) -> list[str]:
        """Returns four lines for a person to read."""
        low, high = self.manual_interval
        average, best = mean(self.sampled), max(self.sampled)
        differ = "" if self.spread is None else f", spread {self.spread:.3f} (chance alone: {self.noise:.3f})"
        return [
            f"headroom: {self.metric} on {self.rows} validation rows; the best constant answer gets {self.chance:.3f}",
            f"  manual prompt {self.manual:.3f} ({low:.3f} to {high:.3f}), no prompt {self.empty:.3f}",
            f"  {len(self.sampled)} prompts of the untrained agent: mean {average:.3f}, best {best:.3f}{differ}",
            f"  {self.verdict}",
        ]


def look(run: Run, count: int) -> Headroom:
    """Scores the manual prompt, the empty one and `count` prompts of the untrained agent; changes nothing."""
    rng = stream(run.config.seed, "headroom")
    queries = [meta_query(run, (), rng) for _ in range(count)]
    generator = torch.Generator(run.policy.device).manual_seed(rng.getrandbits(63))
    written = run.policy.decode(run.policy.sample(queries, generator))
    prompts = list(dict.fromkeys(written))
    rows = run.data.validation
    manual, empty, *table = run.reward.by_example([run.data.spec.manual_prompt, "", *prompts], rows).tolist()
    sampled = [mean(row) for row in table]
    seen = spread(table) if len(table) > 1 else None
    return Headroom(
        metric=run.reward.metric,
        rows=len(rows),
        chance=chance(rows) or 0.0,
        manual=mean(manual),
        manual_interval=interval(manual),
        empty=mean(empty),
        sampled=sampled,
        spread=seen and seen.between,
        noise=seen and seen.noise,
        p=seen and seen.p,
        verdict=_verdict(seen.p if seen else None, sampled, mean(manual), run.config.mode) if count > 1 else TOO_FEW,
    )


def _verdict(p: float | None, sampled: Sequence[float], manual: float, mode: str) -> str:
    if p is None:
        return "the agent wrote the same prompt every time: it has nothing to explore; raise sampling.temperature"
    if math.isnan(p):
        return NO_VERDICT
    if p >= LEVEL and mode == "tte":
        return f"one prompt for all inputs hardly matters: all within noise (p = {p:.2g}); a prompt for each input may"
    if p >= LEVEL:
        return f"prompts hardly matter to this target: all within noise (p = {p:.2g}); expect little from training"
    if max(sampled) <= manual:
        return f"prompts matter (p = {p:.2g}); none of the sampled ones beats the manual prompt yet"
    return f"prompts matter (p = {p:.2g}); the best sampled one beats the manual prompt, in part by luck"
