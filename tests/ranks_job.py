"""The work of the processes in tests/test_ranks.py, which start as under torchrun, but without new imports."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from appo.config import APPOConfig
from appo.lm import adapter
from appo.lm.model import CausalLM
from appo.lm.parallel.ranks import Ranks, RanksError
from appo.lm.parallel.sharded import Sharded
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
DIVIDED = ("whole", "minibatches", "single")  # configurations that are run with a divided agent too
REPEATED = ("minibatches",)
QUERIES = [Query((5, 6, 7)), Query((8, 9))]


def arguments(folder: Path, *more: str, task: str = "sst2") -> list[str]:
    return ["--task", task, "--run", str(folder), *OPTIONS, "device=cpu", *more]


def trainer(ranks: Ranks | None = None, lora: int = 0, **config: Any) -> APPOTrainer:
    """A trainer of a tiny model, with a learning rate that no rounding of a small gradient can turn into a step."""
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    if lora:
        torch.manual_seed(0)
        adapter.add(model, lora)
    lm = CausalLM(model, tokenizer)
    policy = Policy(lm, plain_sampling(8), ranks)
    settings = APPOConfig(learning_rate=1e-5, reference="anchor", **config)
    return APPOTrainer(policy, settings, generator=torch.Generator().manual_seed(0))


def score(prompts: list[str]) -> list[float]:
    return [float(sum(map(ord, prompt)) % 7) for prompt in prompts]


CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"ppo_epochs": 2},
    "minibatches": {"minibatch_size": 3, "micro_batch_size": 1, "ppo_epochs": 1},
    "single": {"minibatch_size": 1, "ppo_epochs": 1},  # one of two ranks has nothing to do
    "adapter": {"lora": 4, "ppo_epochs": 2},
}


def updates(ranks: Ranks | None, names: Sequence[str] = tuple(CONFIGS)) -> dict[str, Any]:
    """What two iterations do to an agent, under several configurations, and how many numbers the ranks exchange."""
    found: dict[str, Any] = {}
    for name in names:
        made = trainer(ranks, **CONFIGS[name])
        done = [made.step(QUERIES, score, copies=3)]
        is_policy = [made.anchor.is_policy()]
        made.anchor.promote()
        is_policy.append(made.anchor.is_policy())
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            done.append(made.step(QUERIES, score, copies=3))
        found[name] = {
            "tokens": [iteration.collected.rollout.tokens for iteration in done],
            "logprobs": [iteration.collected.rollout.logprobs for iteration in done],
            "stats": [iteration.stats for iteration in done],
            "weights": weights(made),
            "exchanged": {call.args[0].numel() for call in reduced.call_args_list},
        }
        is_policy.append(made.anchor.is_policy())
        made.anchor.rollback()
        found[name]["rolled back"] = weights(made)
        found[name]["anchor is policy"] = [*is_policy, made.anchor.is_policy()]
    return found


def weights(made: APPOTrainer) -> Tensor:
    wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in made.policy.parameters()]
    return torch.cat([p.detach().flatten() for p in wholes])


def verbs(ranks: Ranks) -> dict[str, Any]:
    """Returns the results of each verb of Ranks."""
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
    module = torch.nn.ParameterList([torch.full((2,), float(ranks.rank))])
    ranks.begin(module)
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
        "first": module[0].detach(),
        "largest": ranks.largest(ranks.rank),
        "equal": [ranks.equal([(torch.tensor(n), torch.tensor(0))]) for n in (0, ranks.rank)],
        "same": ranks.check_same("nothing", [float("nan")]),
        "apart": apart,
    }


def runs(folder: Path) -> dict[str, int]:
    """Exit codes of whole runs, in one job after another."""
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration > 1 and job.rank() == 1:  # the other process must hear of it
            os.kill(os.getpid(), signal.SIGTERM)

    Progress.show = show_and_signal  # type: ignore[method-assign]
    go_on = ["--run", str(folder / "begun"), "--resume"]  # one process has made an iteration
    codes = {"resumed": main(go_on)}
    job.leave()  # what is stopped does not
    codes["divided"] = main([*go_on, "shard=true"])
    job.leave()
    return codes | {
        "dry": main([*arguments(folder / "dry"), "--dry-run"]),
        "tte": main(arguments(folder / "tte", "mode=tte", "steps=1", "shard=true", task="mixed")),
        "text": main(arguments(folder / "text", "steps=1", task="antonyms")),
    }


def look(folder: Path) -> None:
    """Does all of the above, and writes the results of this process to a file."""
    torch.set_num_threads(1)
    joined = job.join("cpu")
    kept = {"verbs": verbs(joined), "updates": updates(joined), "again": updates(joined, REPEATED)}
    kept["divided"] = updates(Sharded(torch.float32, torch.device("cpu")), DIVIDED)
    job.leave()
    kept["codes"] = runs(folder)
    torch.save(kept, folder / f"rank-{job.rank()}.pt")


def tune(*arguments: str) -> None:
    """Makes a run, like `python -m experiments.train`."""
    sys.exit(main(arguments))


def launch(log: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Starts two processes as torchrun would, in their own process group, with their output in a file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    where = {"run_id": "job", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    elastic_launch(LaunchConfig(1, 1, 2, **where, start_method="fork", max_restarts=0), work)(*arguments)
