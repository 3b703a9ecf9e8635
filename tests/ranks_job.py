"""What the processes of tests/test_ranks.py do; torchrun starts two of them: FOLDER."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.lm.ranks import Ranks, RanksError
from appo.policy import Policy
from appo.rollout import Query
from appo.trainer import APPOTrainer
from experiments.terminal import job
from experiments.terminal.console import Progress
from experiments.train import main
from tests.conftest import byte_tokenizer, llama, plain_sampling

SMALL = {"prompts": 3, "threads": 1, "sampling.max_new_tokens": 8, "examples.test_limit": 8, "anchor.prompts": 2}
OPTIONS = [f"{key}={value}" for key, value in SMALL.items()]
OPTIONS += ["examples.shots=2", "examples.batch_size=2", "headroom=2", "checkpoint_every=2", "anchor.period=1"]
QUERIES = [Query((5, 6, 7)), Query((8, 9))]


def arguments(folder: Path, *more: str, task: str = "sst2") -> list[str]:
    return ["--task", task, "--run", str(folder), *OPTIONS, "device=cpu", *more]


def trainer(ranks: Ranks | None = None, **config: Any) -> APPOTrainer:
    """A trainer of a tiny model, with a learning rate that no rounding of a small gradient can turn into a step."""
    from appo.lm.model import CausalLM

    tokenizer = byte_tokenizer()
    lm = CausalLM(llama(len(tokenizer)), tokenizer)
    policy = Policy(lm, plain_sampling(12), ranks)
    settings = APPOConfig(learning_rate=1e-5, reference="anchor", **config)
    return APPOTrainer(policy, settings, generator=torch.Generator().manual_seed(0))


def score(prompts: list[str]) -> list[float]:
    return [float(sum(map(ord, prompt)) % 7) for prompt in prompts]


CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"ppo_epochs": 2},
    "minibatches": {"minibatch_size": 3, "micro_batch_size": 1, "ppo_epochs": 2},
    "single": {"minibatch_size": 1, "ppo_epochs": 1},  # one of two ranks has nothing to do
}


def updates(ranks: Ranks | None) -> dict[str, Any]:
    """What three iterations do to an agent, under several configurations."""
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        made = trainer(ranks, **config)
        done = [made.step(QUERIES, score, copies=3) for _ in range(2)]
        found[name] = {
            "tokens": [iteration.collected.rollout.tokens for iteration in done],
            "logprobs": [iteration.collected.rollout.logprobs for iteration in done],
            "stats": [iteration.stats for iteration in done],
            "weights": weights(made),
        }
    return found


def weights(made: APPOTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in made.policy.parameters()])


def verbs(ranks: Ranks) -> dict[str, Any]:
    """What the verbs return."""
    lengths = [3, 1, 2, 5, 4]

    def rows(share: slice) -> list[Any]:
        mine = lengths[share]
        table = [[*range(1, n + 1), *[0] * (max(mine) - n)] for n in mine]
        return [torch.tensor(table), torch.tensor(table) > 0, [f"row of {n}" for n in mine]]

    numbers, mask, texts = ranks.divide(5, rows)
    with_none = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    with_none[0].grad = torch.full((2,), 1.0 + ranks.rank) if ranks.rank == 0 else None
    with_none[1].grad = torch.ones(1)
    sums = ranks.sum_gradients(with_none, {"a": 1.0 + ranks.rank})
    first = torch.full((2,), float(ranks.rank))
    ranks.copy_first([first])
    apart = ""
    try:
        ranks.check_same("numbers", ranks.rank)
    except RanksError as error:
        apart = str(error)
    return {
        "numbers": numbers,
        "mask": mask,
        "texts": texts,
        "few": ranks.divide(1, lambda share: [["only"][share]]),
        "gradients": [p.grad for p in with_none],
        "sums": sums,
        "first": first,
        "largest": ranks.largest(ranks.rank),
        "same": ranks.check_same("nothing", [float("nan")]),
        "apart": apart,
    }


def runs(folder: Path) -> dict[str, int]:
    """Exit codes of whole runs, in one job after another."""
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration == 3 and job.rank() == 1:  # the other process must hear of it
            os.kill(os.getpid(), signal.SIGTERM)

    codes = {"fixed": main(arguments(folder / "fixed", "steps=4"))}
    codes["dry"] = main([*arguments(folder / "dry"), "--dry-run"])
    codes["tte"] = main(arguments(folder / "tte", "mode=tte", "steps=1", task="mixed"))
    codes["text"] = main(arguments(folder / "text", "steps=1", task="antonyms"))
    Progress.show = show_and_signal  # type: ignore[method-assign]
    codes["resumed"] = main(["--run", str(folder / "begun"), "--resume"])  # by one process
    return codes


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    joined = job.join("cpu")
    kept = {"verbs": verbs(joined), "updates": updates(joined), "again": updates(joined)}
    job.leave()
    kept["codes"] = runs(target)
    torch.save(kept, target / f"rank-{joined.rank}.pt")
