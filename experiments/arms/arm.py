"""An arm is one way to find prompts. All arms get the same budget of scored prompts, splits and final choice."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from appo.rollout import Query
from appo.selfcheck import SelfCheckError, self_check
from appo.trainer import AnchorReview, APPOTrainer, Iteration, Rewarded
from experiments.arms.batches import Batches
from experiments.arms.choice.pool import PromptPool
from experiments.arms.choice.result import Outcome
from experiments.run.folder import PHASES
from experiments.run.run import Run, stream
from rewards.reward import RewardResult
from tasks.spec import Example

COSTS = (*(f"{phase}_seconds" for phase in PHASES), "answers")


@dataclass(frozen=True)
class Question:
    """The queries to the agent, and the reward of its prompts.

    Attributes:
        queries: the distinct queries.
        copies: how many prompts the agent writes for each query.
        reward_fn: maps prompts to their rewards; the prompts for one query come one after another.
        rows: how many examples each prompt is scored on, in the mean.
        alike: whether all prompts are scored on the same examples; then the target answers a repeated prompt once.
    """

    queries: list[Query]
    copies: int
    reward_fn: Callable[[list[str]], RewardResult]
    rows: float = 1
    alike: bool = False


@dataclass(frozen=True)
class Step:
    """The prompts and rewards of one iteration.

    Attributes:
        prompts: the prompts, in the order of their rewards.
        rewarded: their rewards and metrics.
        stats: statistics of the iteration, by name.
        tokens: how many tokens the agent wrote.
        review: the review of the anchor, if one followed.
    """

    prompts: list[str]
    rewarded: Rewarded
    stats: dict[str, float]
    tokens: int = 0
    review: AnchorReview | None = None

    @classmethod
    def of(cls, iteration: Iteration) -> Self:
        """The step that an iteration of the trainer made."""
        found = iteration.collected
        return cls(found.prompts, found.rewarded, iteration.stats, int(found.rollout.mask.sum()), iteration.review)


class Arm(ABC):
    """Asks for prompts, scores them, updates the agent, and in the end chooses a result.

    A subclass defines the questions (`ask`, `ask_for_review`) and the result (`result`). A subclass that does not learn
    by APPO also defines how an iteration goes (`learn`).

    Attributes:
        number: number of the iteration, from 1.
        pool: the prompts found so far, each for all inputs; empty in an arm that writes a prompt for each input.
        cost: what the last iteration cost: seconds of sampling, of scoring, of the update (with the anchor's
            log-probabilities) and of the whole review, and how many answers the target gave, the review's included.
        generator: random numbers for sampling.
        trainer: trains the agent; an arm that never trains the agent has no trainer, hence no anchor.
    """

    trainer: APPOTrainer

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.pool, self.number = run, PromptPool(), 0
        self.cost = dict.fromkeys(COSTS, 0.0)
        # One stream per purpose: if an arm draws more from one of them, the others still give the same numbers.
        self.streams = {name: stream(config.seed, name) for name in ("batches", "pairs", "review")}
        self.batches = Batches(run.data.train, config.examples.batch_size, self.streams["batches"])
        self.generator = torch.Generator(run.policy.device).manual_seed(config.seed)
        self.prepare()

    def prepare(self) -> None:
        """Prepares the agent for training."""
        self.trainer = APPOTrainer(self.run.policy, self.run.config.appo, self.run.config.anchor, self.generator)

    @abstractmethod
    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """Returns the question of an iteration, whose prompts are scored on this batch of training examples."""

    @abstractmethod
    def ask_for_review(self, rng: random.Random) -> Question:
        """Returns the question of a review: its pairs are training examples, its prompts are scored on validation."""

    @abstractmethod
    def result(self) -> Outcome:
        """Returns the result with its scores on validation and test, and the candidates. Reads the test split."""

    def step(self, number: int) -> Step:
        """Makes iteration `number`, from 1, and the review after it, if one is due.

        Raises:
            SelfCheckError: the first rollout fails the self-check, or the first update changes no weight.
            DivergedError: training cannot go on.
        """
        self.number, self.cost = number, dict.fromkeys(COSTS, 0.0)
        question = self._counted(self.ask(self.batches.next(), self.streams["pairs"]))
        started = time.perf_counter()
        step = self.learn(question)
        before = self.cost["sampling_seconds"] + self.cost["scoring_seconds"]
        self.cost["update_seconds"] = time.perf_counter() - started - before
        return self.reviewed(step)

    def _check_moved(self) -> None:
        """Raises SelfCheckError if the update changed no weight; otherwise such a run would go on unnoticed."""
        before = self.trainer.anchor.state_dict()["parameters"]
        if all(torch.equal(weight, before[name]) for name, weight in self.run.policy.trained().items()):
            raise SelfCheckError("the first update had a gradient and changed no weight of the agent")

    def learn(self, question: Question) -> Step:
        """Collects rollouts and updates the agent; checks both in the first iteration."""
        if self.number == 1:
            generator = torch.Generator(self.run.policy.device).manual_seed(0)
            rollout = self.run.policy.sample(question.queries, generator, question.copies)
            self_check(self.run.policy, self.trainer.anchor, rollout)
        step = Step.of(self.trainer.step(question.queries, question.reward_fn, question.copies))
        if self.number == 1 and step.stats.get("grad_norm"):
            self._check_moved()
        return step

    def reviewed(self, step: Step) -> Step:
        """Adds a review to the step if one is due and the reference is an anchor that reviews may move."""
        due = self.trainer.far or self.number % (self.run.config.anchor.period * self.run.steps_per_epoch) == 0
        if not (due and self.trainer.updater.reference.reviewed):
            return step
        started = time.perf_counter()
        question = self._counted(self.ask_for_review(self.streams["review"]))
        metric = self.run.reward.metric

        def score(prompts: list[str]) -> list[float]:
            found: list[float] = question.reward_fn(prompts).metrics[metric].tolist()
            return found

        scoring = self.cost["scoring_seconds"]
        review = self.trainer.review_anchor(question.queries, score, question.copies)
        self.cost |= {"review_seconds": time.perf_counter() - started, "scoring_seconds": scoring}
        return replace(step, review=review)

    def _counted(self, question: Question) -> Question:
        """Returns the question with a reward function that adds to `cost`. Sampling lasts until its first call."""
        asked = time.perf_counter()

        def reward(prompts: list[str]) -> RewardResult:
            started = time.perf_counter()
            self.cost["sampling_seconds"] = self.cost["sampling_seconds"] or started - asked
            found = question.reward_fn(prompts)
            self.cost["scoring_seconds"] += time.perf_counter() - started
            self.cost["answers"] += question.rows * len(set(prompts) if question.alike else prompts)
            return found

        return replace(question, reward_fn=reward)

    def best_so_far(self) -> dict[str, Any] | None:
        """Returns what best_so_far.json of a stopped run holds; None without a single prompt. Reads no test row."""
        return None

    def learnt(self) -> dict[str, Any]:
        """Returns the state of the training, for a checkpoint."""
        return self.trainer.state_dict()

    def go_on(self, learnt: Mapping[str, Any]) -> None:
        """Restores a saved state of the training."""
        self.trainer.load_state_dict(learnt)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next iteration depends on, for a checkpoint."""
        return {
            "trainer": self.learnt(),
            "pool": self.pool.state_dict(),
            "streams": {name: rng.getstate() for name, rng in self.streams.items()},
            "order": self.batches.order,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state."""
        self.go_on(state["trainer"])
        self.pool.load_state_dict(state["pool"])
        for name, rng in self.streams.items():
            rng.setstate(state["streams"][name])
        self.batches.order = state["order"]
