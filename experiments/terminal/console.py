"""What a run shows on the terminal: its progress, and a short table at the end."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from tasks.errors import printable

WARNINGS = (  # statistic, the value from which on to warn, warning
    ("empty_rate", 0.9, "nearly all prompts are empty; the agent has collapsed: lower appo.learning_rate"),
    ("duplicate_rate", 0.9, "nearly all prompts are the same; the agent no longer explores: lower appo.learning_rate"),
    ("truncated_rate", 0.9, "nearly all prompts are cut off: raise sampling.max_new_tokens"),
    ("skipped_steps", 1.0, "updates were skipped: something is not finite, or a ratio is too large; see metrics.jsonl"),
    ("guard_rollback", 1.0, "no sound update for appo.max_bad_steps iterations: the agent went back to its anchor"),
)


class Progress:
    """A progress bar with reward, accuracy and KL, and the best prompt so far below it.

    If stderr is not a terminal (a log file, CI), it prints a plain line now and then. After the second iteration a line
    says how long the rest will take; the first iteration is slower, since it warms up and checks itself.

    Args:
        steps: iterations in all.
        metric: the name of the score that prompts are judged by.
        quiet: show nothing.
        done: iterations that a resumed run has already made.
    """

    def __init__(self, steps: int, metric: str = "accuracy", quiet: bool = False, done: int = 0) -> None:
        self._steps, self._metric, self._quiet = steps, metric, quiet
        self._timed, self._before = done + 2, time.perf_counter()
        self._warned: set[str] = set()
        self._live = not quiet and sys.stderr.isatty()
        if self._live:
            self._bar = tqdm(total=steps, initial=done, desc="tuning", unit="it", dynamic_ncols=True, position=0)
            self._best = tqdm(total=0, bar_format="{desc}", position=1, leave=False)

    def show(self, iteration: int, stats: Mapping[str, float], best: str = "") -> None:
        """Shows the statistics of an iteration that is done; `best` is a line about the best prompt so far."""
        best = printable(best)
        if not self._quiet:
            self._warn(iteration, stats)
        numbers = {"reward": stats["reward_mean"], self._metric: stats[f"{self._metric}_mean"]}
        numbers |= {"kl": stats["kl"]} if "kl" in stats else {}  # arm edits has none
        if self._live:
            self._bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
            self._bar.update()
            self._best.set_description_str(clip(best, shutil.get_terminal_size().columns - 1))
        elif not self._quiet and (iteration % max(1, self._steps // 20) == 0 or iteration == 1):
            line = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            print(f"{iteration:4d}/{self._steps}  {line}  {clip(best, 100)}", file=sys.stderr, flush=True)
        self._foretell(iteration)

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._live:
            sys.stderr.write("\r\x1b[J")  # a Ctrl-C leaves ^C on the bar's line; tqdm draws the bar again
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def _warn(self, iteration: int, stats: Mapping[str, float]) -> None:
        """Warns when a statistic shows that something is going wrong, once per statistic."""
        for name, bound, words in WARNINGS:
            if stats.get(name, 0.0) >= bound and name not in self._warned:
                self._warned.add(name)
                self.say(f"warning: iteration {iteration}: {words}")

    def _foretell(self, iteration: int) -> None:
        """Says once how long the remaining iterations will take."""
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        left = self._steps - iteration
        if iteration == self._timed and left > 1 and not self._quiet:
            time_left = duration(seconds * left)
            self.say(f"about {time_left} left: {left} iterations of {seconds:.2g} s, then the test split")

    def close(self) -> None:
        """Ends the bar, which stays visible, and removes the line below it."""
        if self._live:
            self._best.close()
            self._bar.close()


def duration(seconds: float) -> str:
    """Returns a time in units for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def clip(text: str, width: int) -> str:
    """Cuts a text to `width` columns of a terminal; a Chinese character, for example, takes two."""
    return text if disp_len(text) <= width else f"{disp_trim(text, max(0, width - 3))}..."[: max(0, width)]


def summary(result: Mapping[str, Any], folder: Path, given: bool = False) -> str:
    """Returns the summary that a run ends with: the manual prompt against the result, and where the files are.

    Args:
        result: the content of best_prompt.json.
        folder: the run's folder.
        given: whether the arm scored a given prompt, so that nothing was chosen.
    """
    name = "a prompt per input" if result["prompt"] is None else "the arm's prompt" if given else "best prompt found"
    rows = [("manual prompt", "manual_"), *([] if result["chosen"] == "manual" else [(name, "")])]
    columns = [f"{split} ({result[f'{split}_rows']} rows)" for split in ("validation", "test")]
    lines = [f"{result['metric']:<20}{columns[0]:<26}{columns[1]}"]
    lines += [
        f"{name:<20}{_score(result, f'{which}validation'):<26}{_score(result, f'{which}test')}" for name, which in rows
    ]
    verdict = [result["verdict"]] if len(rows) > 1 or not given else []
    lines += ["", *verdict, *_answers(result)]
    if (expected := result.get("expected_on_new_rows")) is not None and not given:
        lines.append(f"validation flatters the prompt that it chose; expect about {_number(expected)} on new rows")
    if (protocol := result.get("paper_protocol")) and not given:
        lines.append(f"paper's protocol ({protocol['name']}): {_number(protocol['test_score'])}")
    if result["prompt"] is None:
        lines += [f"for {edit['input']!r}:\n    {_lines(edit['prompt'])}" for edit in result["edits"][:2]]
        lines.append(f"agent:       {folder / 'agent'}")
    else:
        lines.append(f"prompt:      {_lines(result['prompt'])}")
    lines.append(f"report:      {folder / 'report.html'}")
    lines += ["", "use it, and look at the report:"]
    lines.append(f"  {our_command('prompt', '--run', str(folder), '--input', 'TEXT', '--answer')}")
    lines.append(f"  {'open' if sys.platform == 'darwin' else 'xdg-open'} {shlex.quote(str(folder / 'report.html'))}")
    return "\n".join(lines)


def stopped(folder: Path, kept: Path, found: Mapping[str, Any] | None) -> str:
    """Returns the summary of a run that was stopped: the best prompt so far, if there is one, and how to go on.

    Args:
        folder: the run's folder.
        kept: the file with the best prompt so far.
        found: the content of that file; None if there is none.
    """
    lines = []
    if found:
        scores = " and ".join(_score(found, f"{which}validation") for which in ("", "manual_"))
        rows = f"{found['validation_rows']} validation rows"
        lines.append(f"best prompt so far: {_lines(found['prompt'])}")
        lines.append(f"  its {found['metric']} on {rows}, and that of the manual prompt: {scores}")
        lines.append(f"  kept in {kept}; it has no test score")
    lines.append(f"to go on: {our_command('train', '--run', str(folder), '--resume')}")
    return "\n".join(lines)


def requests(cost: Mapping[str, int], resumed: bool = False) -> str:
    """Returns a line that says how many requests the target's server got, in a resumed run those since the resume."""
    again = f" ({cost['retries']:,} of them retries)" if cost["retries"] else ""
    asked, tokens = cost["requests"], cost["prompt_tokens"]
    since = "since the run was resumed, " if resumed else ""
    return f"{since}the target's server got {asked:,} requests{again}, with {tokens:,} tokens of prompts"


def our_command(*words: str) -> str:
    """Returns a command of `appo` in the form that works in this shell, however this process was started."""
    started = Path(sys.argv[0])
    if shutil.which("appo"):
        program = ["appo"]
    else:
        program = [str(started)] if started.name == "appo" else [sys.executable, "-m", "experiments.cli"]
    return shlex.join([*program, *words])


def _score(result: Mapping[str, Any], name: str) -> str:
    """A score and its 95 % interval."""
    low, high = result[f"{name}_interval"]
    return f"{_number(result[f'{name}_score'])} ({_number(low)} to {_number(high)})"


def _answers(result: Mapping[str, Any]) -> list[str]:
    """Returns a line with each label's share of the answers on test; it reveals a target that always says the same."""
    spread = result.get("answers_on_test") or {}
    shares = {name: ", ".join(f"{word} {share:.2f}" for word, share in spread[name].items()) for name in spread}
    return [f"answers on test: {shares['best']} (right: {shares['right']})"] if shares else []


def _number(score: float | None) -> str:
    """Returns a score with three decimals; "none" for a score that is not finite, which files hold as null."""
    return f"{score:.3f}" if score is not None and math.isfinite(score) else "none"


def _lines(prompt: str) -> str:
    """Returns a prompt with its line breaks, and with other control characters escaped, which a terminal would obey."""
    return "\n".join(map(printable, prompt.split("\n")))
