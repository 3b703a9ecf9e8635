"""Measures the lab: the target's accuracy under good and bad instructions, and how rare good instructions are.

    python -m experiments.lab.landscape                 the table of accuracies
    python -m experiments.lab.landscape --prior 1024    also how often the untrained agent comes close to the best

Accuracies are measured on the test rows and averaged over several wordings of each kind of instruction.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from appo.config import SamplingConfig
from appo.policy import Policy
from experiments.config import LAB_DIR, build_config
from experiments.lab import grammar
from experiments.run.models import load_model
from experiments.terminal.command import Parser, UsageError, in_order
from rewards.local import LocalTarget
from rewards.reward import ClassificationReward
from tasks.meta_prompt import meta_prompt
from tasks.sources import load_task
from tasks.splits import TaskData

WORDINGS = 3  # of each kind of instruction
Writer = Callable[[random.Random, str], str]


def _written(clauses: Callable[[str], Sequence[grammar.Clause]]) -> Writer:
    return lambda rng, task: grammar.write(rng, clauses(task))


def _wrong_criterion(task: str) -> list[grammar.Clause]:
    return [grammar.Judge("size" if task == "sst2" else "person"), *grammar.right_clauses(task)[1:]]


KINDS: dict[str, Writer] = {
    "best": _written(grammar.right_clauses),
    "manual": _written(grammar.manual_clauses),
    "one short": _written(lambda task: grammar.right_clauses(task)[:-1]),
    "other task": _written(_wrong_criterion),
    "reversed": _written(grammar.reversed_clauses),
    "vague": lambda rng, task: rng.choice(grammar.VAGUE),
    "empty": lambda rng, task: "",
    "shuffled": lambda rng, task: grammar.shuffled(rng, grammar.write(rng, grammar.right_clauses(task))),
    "gibberish": lambda rng, task: grammar.gibberish(rng, 25),
}


def load_reward(task: str, folder: Path = LAB_DIR) -> tuple[TaskData, ClassificationReward]:
    """Loads a lab task, and the reward with the lab's target."""
    data = load_task(task, str(LAB_DIR / "data"))
    target = load_model(build_config({"target": str(folder / "target")}), "target")
    return data, ClassificationReward(LocalTarget(target, data.spec.template, data.words))


def accuracies(task: str, folder: Path = LAB_DIR, seed: int = 0) -> dict[str, float]:
    """Returns the mean test accuracy under each kind of instruction."""
    rng = random.Random(seed)
    data, reward = load_reward(task, folder)
    prompts = {kind: [write(rng, task) for _ in range(WORDINGS)] for kind, write in KINDS.items()}
    return {kind: reward(texts, data.test).metrics["accuracy"].mean().item() for kind, texts in prompts.items()}


def prior(task: str, samples: int, folder: Path = LAB_DIR, seed: int = 0, batch: int = 256) -> tuple[int, float]:
    """Counts prompts of the untrained agent that come within two points of the best; also returns the best accuracy.

    Prompts are screened first: on eight validation rows they may miss two, on all validation rows ten points. Prompts
    that pass are scored on the test rows.

    Args:
        task: a task of the lab.
        samples: how many prompts the agent writes.
        folder: the folder of agent and target.
        seed: seed of the sampling.
        batch: most prompts for one meta-prompt.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    data, reward = load_reward(task, folder)
    best = accuracies(task, folder)["best"]
    agent = load_model(build_config({"agent": str(folder / "agent")}), "agent")
    policy = Policy(agent, SamplingConfig(96))
    hits = 0
    for start in tqdm(range(0, samples, batch), desc=f"prior {task}", disable=None):
        query = policy.query(*meta_prompt(rng.sample(data.train, 5)))
        near = policy.decode(policy.sample([query], generator, min(batch, samples - start)))
        for rows, slack in ((data.validation[:8], 0.25), (data.validation, 0.1)):
            scores = reward(near, rows).metrics["accuracy"].tolist() if near else []
            near = [prompt for prompt, score in zip(near, scores, strict=True) if score >= best - slack]
        if near:
            hits += int((reward(near, data.test).metrics["accuracy"] >= best - 0.02).sum())
    return hits, best


def poisson_bound(hits: int) -> float:
    """The upper 95 % bound on the mean of a Poisson variable that was `hits` once (Gehrels 1986, Eq. 9)."""
    return (hits + 1) * (1 - 1 / (9 * (hits + 1)) + 1.645 / (3 * (hits + 1) ** 0.5)) ** 3


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints the tables, in Markdown."""
    parser = Parser("python -m experiments.lab.landscape", __doc__)
    parser.add_argument("tasks", nargs="*", default=list(grammar.LABS), help="tasks of the lab (default: all six)")
    parser.add_argument("--prior", type=int, default=0, metavar="N", help="prompts of the untrained agent to sample")
    parser.add_argument("--folder", type=Path, default=LAB_DIR, help="where agent and target are")
    options = parser.parse_args(argv)
    for task in options.tasks:
        if task not in grammar.LABS:
            raise UsageError(f"the lab has no task {task!r}; tasks are {', '.join(grammar.LABS)}")
    if options.prior < 0:
        raise UsageError(f"--prior is {options.prior}; expected at least 0")
    torch.set_num_threads(2)
    print("| task | " + " | ".join(KINDS) + " |\n|" + "---|" * (len(KINDS) + 1))
    for task in options.tasks:
        row = accuracies(task, options.folder)
        print(f"| {task} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |", flush=True)
    if options.prior:
        print("\n| task | prompts sampled | within two points of the best | upper 95 % bound |\n|---|---|---|---|")
        for task in options.tasks:
            hits, _ = prior(task, options.prior, options.folder)
            print(f"| {task} | {options.prior} | {hits} | {poisson_bound(hits) / options.prior:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
