"""Scores a finished run on its test split.

    appo evaluate --run DIR               the best prompt, or (mode tte) the likeliest for each input
    appo evaluate --run DIR --sampled     one sampled prompt for each input
    appo evaluate --run DIR --votes 5     five sampled prompts for each input, which vote

Writes evaluation.json into the run's folder. Every vote costs one more prompt of the agent and one more answer of the
target for each input; what that comes to is shown.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.command import Parser, UsageError, in_order
from experiments.fingerprint import changed_since
from experiments.runlog import read_result
from experiments.session import Run, open_run
from experiments.strict import LARGEST
from rewards.functional import best, normalise
from rewards.generation import generate
from rewards.reward import STOPS, TEXT_METRICS, GenerationReward
from rewards.target import NO_NUMBERS
from tasks.spec import Example

Vote = Literal["majority", "margin"]


def count_votes(probabilities: Tensor, how: Vote) -> Tensor:
    """The class that K answers to each of N inputs come to.

    Args:
        probabilities: [K, N, C], over the classes.
        how: "majority": the class that most answers name, of equals the one with more probability in all;
            "margin": what the answer says whose first class leads its second by most.

    Returns:
        [N] class indices.
    """
    if how == "margin":
        top = probabilities.topk(2, dim=-1).values  # [K, N, 2]
        surest = (top[..., 0] - top[..., 1]).argmax(0)  # [N]
        return probabilities.argmax(-1).gather(0, surest.unsqueeze(0)).squeeze(0)
    named = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(0)  # [N, C]
    return (named + probabilities.mean(0)).argmax(-1)  # the mean is below 1, so it only breaks ties


def evaluate(run: Run, votes: int = 1, how: Vote = "majority", sampled: bool = False, seed: int = 0) -> dict[str, Any]:
    """The run's score on its test split, and what it cost.

    Args:
        run: a finished run.
        votes: prompts for each input; more than one are sampled, and vote.
        how: how votes are counted.
        sampled: sample a single prompt too, in place of the likeliest one.
        seed: of the sampling.

    Raises:
        UsageError: votes for a run with one prompt, or votes by margin on generated text.
        FloatingPointError: the target's answers are not numbers.
    """
    examples, started = run.data.test, time.perf_counter()
    if run.config.mode == "fixed":
        if votes > 1 or sampled:
            raise UsageError("this run has one prompt for all inputs; sampling and votes need a run in mode tte")
        prompt = read_result(run.log.folder)["prompt"]
        score = run.reward([prompt], examples).metrics[run.reward.metric].item()
    else:
        generator = torch.Generator(run.policy.device).manual_seed(seed) if votes > 1 or sampled else None
        inputs = [example.input for example in examples]
        prompts = [run.editor.write(inputs, seed=draw, generator=generator) for draw in range(votes)]
        score = _voted(run, prompts, examples, how) if votes > 1 else _mean(run, prompts[0], examples)
    seconds = time.perf_counter() - started
    if not math.isfinite(score):
        raise FloatingPointError(NO_NUMBERS)
    return {
        "task": run.data.spec.name,
        "mode": run.config.mode,
        "metric": run.reward.metric,
        "examples": len(examples),
        "votes": votes,
        "vote": how if votes > 1 else None,
        "sampled": sampled or votes > 1,
        "test_score": score,
        "prompts_written": 1 if run.config.mode == "fixed" else votes * len(examples),
        "answers_of_the_target": votes * len(examples),
        "milliseconds_per_input": 1000 * seconds / len(examples),
    }


def _mean(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> float:
    return run.reward.each(prompts, examples).metrics[run.reward.metric].mean().item()


def _voted(run: Run, prompts: Sequence[Sequence[str]], examples: Sequence[Example], how: Vote) -> float:
    inputs = [example.input for example in examples]
    if isinstance(run.reward, GenerationReward):
        if how == "margin":
            raise UsageError("generated text has no margin; use --vote majority")
        said = [generate(run.reward.target, row, inputs, run.reward.answer_tokens, STOPS) for row in prompts]
        metric = TEXT_METRICS[run.reward.metric]
        chosen = [_commonest(answers) for answers in zip(*said, strict=True)]
        return sum(best(metric, text, e.answers) for text, e in zip(chosen, examples, strict=True)) / len(examples)
    logits = torch.stack([run.reward.target.pair_logits(row, inputs) for row in prompts]).cpu()
    if logits.isnan().any():
        raise FloatingPointError(NO_NUMBERS)
    for n, example in enumerate(examples):
        if example.choices:
            logits[:, n, example.choices :] = -torch.inf
    classes = count_votes(logits.softmax(-1), how).tolist()
    right = [c in (e.label, *e.also) for c, e in zip(classes, examples, strict=True)]
    return sum(right) / len(right)


def _commonest(answers: Sequence[str]) -> str:
    """The answer that is given most often, as it was first put."""
    (winner, _), *_ = Counter(map(normalise, answers)).most_common(1)
    return next(answer for answer in answers if normalise(answer) == winner)


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints and writes the scores; returns the exit code."""
    parser = Parser(prog="appo evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--votes", type=int, default=1, metavar="K", help="prompts per input (default: 1)")
    parser.add_argument("--sampled", action="store_true", help="sample the prompt, in place of the likeliest one")
    parser.add_argument("--vote", choices=["majority", "margin"], default="majority", help="how they are counted")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(argv)
    if options.votes < 1:
        raise UsageError(f"--votes is {options.votes}; expected at least 1")
    if not 0 <= options.seed <= LARGEST[int]:
        raise UsageError(f"--seed is {options.seed}; expected 0 to {LARGEST[int]}")
    run = open_run(options.run, options.trust_remote_code)
    if parts := changed_since(options.run, run.fingerprint):
        print(f"note: the task is not what the run was made with; changed: {parts}", file=sys.stderr)
    result = evaluate(run, options.votes, options.vote, options.sampled, options.seed)
    result["changed"] = parts or None
    for name, value in result.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<24}{shown}")
    run.log.write_json("evaluation.json", result)  # last: where it cannot be written, the scores have been shown
    return 0


if __name__ == "__main__":
    sys.exit(main())
