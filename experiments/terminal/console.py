"""What a run shows on the terminal: progress while it works, a short table at the end."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

WARNINGS = (  # statistic, lowest value to warn of, warning
    ("empty_rate", 0.9, "nearly all prompts are empty; the agent has collapsed: lower appo.learning_rate"),
    ("duplicate_rate", 0.9, "nearly all prompts are the same; the agent no longer explores: lower appo.learning_rate"),
    ("truncated_rate", 0.9, "nearly all prompts are cut off: raise sampling.max_new_tokens"),
    ("skipped_steps", 1.0, "no update: reward, loss or gradient not finite, or ratio too large; see metrics.jsonl"),
)


class Progress:
    """A progress bar with reward, accuracy and KL, and the best prompt so far below it.

    Where stderr is no terminal (a log file, CI), it prints a plain line now and then.

    Args:
        steps: iterations in all.
        metric: the name of the score that prompts are judged by.
        quiet: show nothing.
        done: iterations that a resumed run has already made.
    """

    def __init__(self, steps: int, metric: str = "accuracy", quiet: bool = False, done: int = 0) -> None:
        self._steps, self._metric, self._quiet = steps, metric, quiet
        self._warned: set[str] = set()
        self._live = not quiet and sys.stderr.isatty()
        if self._live:
            self._bar = tqdm(total=steps, initial=done, desc="tuning", unit="it", dynamic_ncols=True, position=0)
            self._best = tqdm(total=0, bar_format="{desc}", position=1)

    def show(self, iteration: int, stats: Mapping[str, float], best: str = "") -> None:
        """Moves on to `iteration`; `best` says which prompt is the best so far."""
        if not self._quiet:
            self._warn(iteration, stats)
        numbers = {"reward": stats["reward_mean"], self._metric: stats[f"{self._metric}_mean"], "kl": stats["kl"]}
        if self._live:
            self._bar.update()
            self._bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()})
            self._best.set_description_str(clip(best, shutil.get_terminal_size().columns - 1))
        elif not self._quiet and (iteration % max(1, self._steps // 20) == 0 or iteration == 1):
            line = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            print(f"{iteration:4d}/{self._steps}  {line}  {clip(best, 100)}", file=sys.stderr, flush=True)

    def _warn(self, iteration: int, stats: Mapping[str, float]) -> None:
        """Warns, once for each statistic, that something is going wrong."""
        for name, bound, words in WARNINGS:
            if stats.get(name, 0.0) >= bound and name not in self._warned:
                self._warned.add(name)
                tqdm.write(f"warning: iteration {iteration}: {words}", file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._live:
            self._best.close()
            self._bar.close()


def clip(text: str, width: int) -> str:
    """`text` on at most `width` columns."""
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."


def summary(result: Mapping[str, Any], folder: Path) -> str:
    """The table a run ends with: the manual prompt against the best one found, and where everything is."""
    name = "a prompt per input" if result["prompt"] is None else "best prompt found"
    rows = [("manual prompt", "manual_"), *([] if result["chosen"] == "manual" else [(name, "")])]
    columns = [f"{split} ({result[f'{split}_rows']} rows)" for split in ("validation", "test")]
    lines = [f"{result['metric']:<20}{columns[0]:<26}{columns[1]}"]
    lines += [
        f"{name:<20}{_score(result, f'{which}validation'):<26}{_score(result, f'{which}test')}" for name, which in rows
    ]
    lines += ["", result["verdict"], *_answers(result)]
    if protocol := result.get("paper_protocol"):
        lines.append(f"paper's protocol ({protocol['name']}): {_number(protocol['test_score'])}")
    if result["prompt"] is None:
        lines += [f"for {edit['input']!r}:\n    {edit['prompt']}" for edit in result["edits"][:2]]
        lines.append(f"agent:       {folder / 'agent'}")
    else:
        lines.append(f"prompt:      {result['prompt']}")
    lines.append(f"report:      {folder / 'report.html'}")
    return "\n".join(lines)


def _score(result: Mapping[str, Any], name: str) -> str:
    """A score and its 95 % interval."""
    low, high = result[f"{name}_interval"]
    return f"{_number(result[f'{name}_score'])} ({_number(low)} to {_number(high)})"


def _answers(result: Mapping[str, Any]) -> list[str]:
    """How the answers on test are spread over the labels, which reveals a target that always gives the same answer."""
    spread = result.get("answers_on_test") or {}
    shares = {name: ", ".join(f"{word} {share:.2f}" for word, share in spread[name].items()) for name in spread}
    return [f"answers on test: {shares['best']} (right: {shares['right']})"] if shares else []


def _number(score: float) -> str:
    return f"{score:.3f}" if math.isfinite(score) else "none"
