"""Scores a finished run on its test split.

    appo evaluate --run DIR               the run's prompt; in mode tte the most likely prompt for each input
    appo evaluate --run DIR --sampled     one sampled prompt for each input (mode tte)
    appo evaluate --run DIR --votes 5     majority vote of five sampled prompts for each input (mode tte)

Writes evaluation.json into the run's folder. Per input, each vote costs one prompt of the agent and one answer of the
target; the totals are printed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.config import RunConfig
from experiments.config.strict import LARGEST
from experiments.run.fingerprint import changed_since
from experiments.run.folder import EVALUATION, finished, read_result
from experiments.run.statistics import Interval, interval
from experiments.terminal.command import Parser, UsageError, in_order
from experiments.terminal.signals import ending_at_once
from tasks.spec import Example

if TYPE_CHECKING:
    from experiments.run.run import Run
    from rewards.reward import Reply

Vote = Literal["majority", "margin"]


def vote(replies: Sequence[Reply], how: Vote) -> str:
    """Returns the answer that several replies to one input vote for.

    Args:
        replies: at least one reply.
        how: "majority": the most frequent answer; in a tie the one with the higher total probability, then the first.
            "margin": the answer of the reply with the largest gap between its two highest probabilities.
    """
    from rewards.functional import normalise

    if how == "margin":
        return max(replies, key=lambda reply: _lead(sorted(reply.probabilities.values()))).answer
    named: dict[str, list[str]] = {}  # texts that only differ in case or punctuation count as one answer
    for reply in replies:
        named.setdefault(reply.answer if reply.probabilities else normalise(reply.answer), []).append(reply.answer)
    chances = {name: sum(reply.probabilities.get(name, 0.0) for reply in replies) for name in named}
    return named[max(named, key=lambda name: (len(named[name]), chances[name]))][0]


def _lead(ascending: Sequence[float]) -> float:
    return ascending[-1] - ascending[-2]


def evaluate(run: Run, votes: int = 1, how: Vote = "majority", sampled: bool = False, seed: int = 0) -> dict[str, Any]:
    """Returns the run's score on its test split, and what it cost.

    Args:
        run: a finished run.
        votes: number of prompts for each input; if more than one, they are sampled and vote.
        how: how votes are counted.
        sampled: whether to sample the prompt even if there is only one, instead of greedy decoding.
        seed: seed of the sampling.

    Raises:
        UsageError: the run has one prompt for all inputs and cannot sample, or generated text is to vote by margin.
        FloatingPointError: the target's logits are not finite.
    """
    from rewards.target import NO_NUMBERS

    check_sampling(run.config, votes, sampled)
    if votes > 1 and how == "margin" and not run.data.words:
        raise UsageError("generated text has no margin; use --vote majority")
    examples, started = run.data.test, time.perf_counter()
    if run.config.mode == "fixed":
        prompt = read_result(run.folder.path)["prompt"]
        values = run.reward.by_example([prompt], examples)[0].tolist()
    else:
        prompts = _written(run, votes, sampled, seed)
        values = _voted(run, prompts, examples, how) if votes > 1 else _each(run, prompts[0], examples)
    seconds = time.perf_counter() - started
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(NO_NUMBERS)
    return {
        "task": run.data.spec.name,
        "mode": run.config.mode,
        "metric": run.reward.metric,
        "examples": len(examples),
        "votes": votes,
        "vote": how if votes > 1 else None,
        "sampled": sampled or votes > 1,
        "test_score": sum(values) / len(values),
        "test_interval": interval(values),
        "prompts_written": 1 if run.config.mode == "fixed" else votes * len(examples),
        "answers_of_the_target": votes * len(examples),
        "milliseconds_per_input": 1000 * seconds / len(examples),
        **(run.served.cost() if run.served else {}),
    }


def check_sampling(config: RunConfig, votes: int, sampled: bool) -> None:
    """Refuses votes and sampling for a run that has one prompt for all inputs.

    Raises:
        UsageError: they were asked for.
    """
    if config.mode == "fixed" and (votes > 1 or sampled):
        raise UsageError("this run has one prompt for all inputs; sampling and votes need a run in mode tte")


def _written(run: Run, votes: int, sampled: bool, seed: int) -> list[list[str]]:
    """Lets the agent write `votes` prompts for each test input: greedily, or sampled if asked or needed for a vote."""
    import torch

    from experiments.arms.editor import editor_of

    generator = torch.Generator(run.policy.device).manual_seed(seed) if votes > 1 or sampled else None
    editor, inputs = editor_of(run), [example.input for example in run.data.test]
    return [editor.write(inputs, seed=draw, generator=generator) for draw in range(votes)]


def _each(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    values: list[float] = run.reward.each(prompts, examples).metrics[run.reward.metric].tolist()
    return values


def _voted(run: Run, prompts: Sequence[Sequence[str]], examples: Sequence[Example], how: Vote) -> list[float]:
    from rewards.target import NO_NUMBERS

    inputs, choices = [example.input for example in examples], [example.choices for example in examples]
    replies = [run.reward.reply(row, inputs, choices) for row in prompts]
    if not all(reply.sound for row in replies for reply in row):
        raise FloatingPointError(NO_NUMBERS)
    chosen = [vote(given, how) for given in zip(*replies, strict=True)]
    return list(map(run.reward.right, chosen, examples))


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints and writes the scores; returns the exit code."""
    parser = Parser("appo evaluate", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--votes", type=int, default=1, metavar="K", help="prompts per input (default: 1)")
    parser.add_argument("--sampled", action="store_true", help="sample the prompt instead of taking the most likely")
    parser.add_argument("--vote", choices=["majority", "margin"], help="how votes are counted (default: majority)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(argv)
    if options.votes < 1:
        raise UsageError(f"--votes is {options.votes}; expected at least 1")
    if options.vote and options.votes == 1:
        raise UsageError("--vote has no effect with one vote; give --votes 2 or more")
    if not 0 <= options.seed <= LARGEST[int]:
        raise UsageError(f"--seed is {options.seed}; expected 0 to {LARGEST[int]}")
    check_sampling(finished(options.run)[0], options.votes, options.sampled)
    with ending_at_once():
        from experiments.run.run import open_run  # takes seconds to load
    run = open_run(options.run, options.trust_remote_code)
    if parts := changed_since(options.run, run.fingerprint):
        print(f"note: the task has changed since the run: {parts}", file=sys.stderr)
    if run.config.mode == "tte" and read_result(run.folder.path)["prompt"] is not None:
        print("note: the run chose the manual prompt; the scores here are of the agent's instructions", file=sys.stderr)
    result = evaluate(run, options.votes, options.vote or "majority", options.sampled, options.seed)
    result["changed"] = parts or None
    for name, value in result.items():
        if value is None:
            continue
        shown = f"{value:.3f}" if isinstance(value, float) else value
        if isinstance(value, Interval):
            shown = f"{value.low:.3f} to {value.high:.3f} (95 %)"
        print(f"{name.replace('_', ' '):<24}{shown}")
    run.folder.write_json(EVALUATION, result)  # last, so that the scores are shown even if this fails
    return 0


if __name__ == "__main__":
    sys.exit(main())
