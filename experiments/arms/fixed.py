"""One prompt for the whole task: APPO as in the paper."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo.lm.model import ContextTooLongError
from appo.rollout import Query
from experiments.arms.arm import Arm, Question, Step
from experiments.arms.batches import Batches
from experiments.arms.choice.pool import PoolEntry, PromptPool
from experiments.arms.choice.race import race
from experiments.arms.choice.result import (
    Outcome,
    answers,
    chance,
    described,
    predictions,
    scores,
    shares,
    split_scores,
)
from experiments.config import GIVEN
from experiments.run.run import Run, few_shot_prompts, stream
from experiments.run.statistics import corrected, interval
from tasks.meta_prompt import meta_prompt
from tasks.spec import Example

REVIEW_QUERIES = 8  # most meta-prompts in a review
PAPER_POOL = 5  # the paper runs this many prompts on test and reports the best [P, 4.1]


class Candidate(NamedTuple):
    """A prompt that may become the result, its kind (manual, few-shot, tuned, ...), and its training reward if any."""

    prompt: str
    kind: str
    reward: float | None = None


def meta_query(run: Run, scored: Sequence[Example], rng: random.Random, best: Sequence[str] = ()) -> Query:
    """Returns a meta-prompt of training pairs; leaves out the examples in `scored` if enough others remain.

    Args:
        run: gives the training examples, and the agent that is asked.
        scored: the examples that the prompts will be scored on.
        rng: draws the pairs.
        best: good prompts to show, best first; only as many as fit the agent's context are shown.
    """
    known = set(scored)
    others = [example for example in run.data.train if example not in known]
    count = min(run.config.examples.pairs, len(run.data.train))
    pairs = rng.sample(others if len(others) >= count else run.data.train, count)
    for shown in range(len(best), 0, -1):
        query = run.policy.query(*meta_prompt(pairs, best[:shown]))
        try:
            run.policy.check_fits(query)
        except ContextTooLongError:
            continue
        return query
    return run.policy.query(*meta_prompt(pairs))


class FixedPrompt(Arm):
    """Every iteration asks for K prompts and scores them on the same batch."""

    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """Asks for K prompts with one meta-prompt."""
        query = meta_query(self.run, batch, rng, self._shown())
        count, reward = self.run.config.prompts, self.run.reward
        return Question([query], count, lambda prompts: reward(prompts, batch), len(batch), alike=True)

    def ask_for_review(self, rng: random.Random) -> Question:
        """Asks for `anchor.prompts` prompts, divided evenly among up to eight meta-prompts.

        Scores differ more between prompts than between rows. So for the same number of answers, many prompts on few
        rows each (`examples.review_rows`) tell more than few prompts on all rows. Agent and anchor get the same rows in
        the same order.
        """
        config, rows, reward = self.run.config, self.run.data.validation, self.run.reward
        count, best = config.anchor.prompts, self._shown()
        asked = max(n for n in range(1, REVIEW_QUERIES + 1) if count % n == 0)
        queries = [meta_query(self.run, (), rng, best) for _ in range(asked)]
        each = config.examples.review_rows or len(rows)
        if each >= len(rows):
            return Question(queries, count // asked, lambda prompts: reward(prompts, rows), len(rows), alike=True)
        batches = Batches(rows, each, rng)
        own = [batches.next() for _ in range(count)]
        return Question(queries, count // asked, lambda prompts: reward.apart(prompts, own), sum(map(len, own)) / count)

    def _shown(self) -> list[str]:
        """Returns the best prompts so far, as many as the meta-prompt shows (`show_best`)."""
        return [entry.prompt for entry in self.pool.best(self.run.config.show_best)]

    def learn(self, question: Question) -> Step:
        """Learns as any arm, and adds the prompts to the pool."""
        step = super().learn(question)
        self.pool.add(step.prompts, step.rewarded.scores.tolist())
        return step

    def candidates(self) -> list[Candidate]:
        """Returns the candidates for the result: the manual prompt first, then few-shot prompts, then tuned ones."""
        config, data = self.run.config, self.run.data
        tuned = [Candidate(entry.prompt, "tuned", entry.reward) for entry in self._shortlist()[: config.pool]]
        shots = [Candidate(prompt, "few-shot") for prompt in few_shot_prompts(config, data)]
        return [Candidate(data.spec.manual_prompt, "manual"), *shots, *tuned]

    def _shortlist(self) -> list[PoolEntry]:
        """Returns the best prompts of the pool, best first; if batches have fewer rows, by reward on all training rows.

        A reward on one batch is largely the luck of its rows, so the `shortlist` best are scored again.
        """
        config, train = self.run.config, self.run.data.train
        best = self.pool.best(max(config.pool, config.shortlist))
        if not best or not config.shortlist or config.examples.batch_size >= len(train):
            return best
        again, prompts = PromptPool(), [entry.prompt for entry in best]
        again.add(prompts, self.run.reward(prompts, train).scores.tolist())
        return again.best(len(best))

    def choose(self, means: Sequence[float], rewards: Sequence[float]) -> int:
        """Returns the index of the result, from scores and rewards on validation; the manual prompt wins a tie."""
        best = max(range(len(means)), key=lambda i: (means[i], rewards[i], -i))
        return best if means[best] > means[0] else 0

    def result(self) -> Outcome:
        """Chooses the best candidate on validation and runs it on test.

        The manual prompt is a candidate, so the result never scores below it on validation; in a tie the manual prompt
        wins. The paper reports the best of the top five *on test*, which selects on the test split and reads it five
        more times; the key `paper_protocol` asks for that number, to compare with published tables.

        Raises:
            FloatingPointError: no prompt has a finite score.
        """
        run, manual, test = self.run, self.run.data.spec.manual_prompt, self.run.data.test
        searched = run.config.arm not in GIVEN
        comparable = searched and not run.config.race  # all candidates have been scored on all rows
        candidates = self.candidates()
        prompts = [candidate.prompt for candidate in candidates]
        table = self._on_validation(prompts)
        validation = table[run.reward.metric]
        rewards = run.reward.weighed({name: values.mean(1) for name, values in table.items()}).scores
        if not rewards.isfinite().any():
            raise FloatingPointError("no prompt has a finite score on the validation split; see metrics.jsonl")
        rewards, means = rewards.nan_to_num(-math.inf), validation.mean(1).nan_to_num(-math.inf).tolist()
        best = self.choose(means, rewards.tolist())
        of_manual, of_best = (answers(run, [prompt] * len(test), test) for prompt in (manual, prompts[best]))
        result = {
            "prompt": prompts[best],
            "chosen": candidates[best].kind,
            **described(run),
            "chance": chance(test),
            **scores(
                {"validation": validation[best], "test": of_best.values},
                {"validation": validation[0], "test": of_manual.values},
            ),
            "expected_on_new_rows": corrected(validation.nan_to_num(0).tolist()) if comparable else None,
            "answers_on_test": self._shares(of_best.records, of_manual.records) if run.data.words else {},
            "paper_protocol": self._paper_protocol(candidates) if searched and run.config.paper_protocol else None,
        }
        listed = self._listed(candidates, validation)
        return Outcome(result, listed, predictions(test, of_manual, of_best, run.target.words))

    def _paper_protocol(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Returns the test score that the paper would report: that of the best of the top five on test."""
        top = [prompt for prompt, kind, _ in candidates if kind == "tuned"][:PAPER_POOL]
        values = self.run.reward.by_example(top or [self.run.data.spec.manual_prompt], self.run.data.test)
        luckiest = values[int(values.sum(1).nan_to_num(-math.inf).argmax())].tolist()
        return {
            "name": f"best of the top {len(values)} by training reward, chosen on test",
            "test_score": sum(luckiest) / len(luckiest),
            "test_interval": interval(luckiest),
        }

    def _listed(self, candidates: Sequence[Candidate], validation: Tensor) -> list[dict[str, Any]]:
        """Returns the rows of candidates.jsonl, best first; `validation` holds the scores on each row, [K, N]."""
        scored = validation.isfinite() if self.run.config.race else torch.ones_like(validation, dtype=torch.bool)
        scored[~scored.any(1)] = True  # a prompt without any finite score: its mean is NaN, not that of no rows
        listed = [
            {
                **candidate._asdict(),
                "validation_score": values[known].mean().item(),
                "validation_interval": interval(values[known].tolist()),
                "validation_rows": int(known.sum()),
            }
            for candidate, values, known in zip(candidates, validation, scored, strict=True)
        ]
        return sorted(listed, key=lambda row: (-row["validation_rows"], -row["validation_score"]))

    def _on_validation(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the candidates' metrics on validation by name, [K, N]; NaN where a race did not score a prompt."""
        run, examples = self.run, self.run.data.validation
        if not run.config.race:
            return run.reward.table(prompts, examples)

        def score(alive: Sequence[int], rows: Sequence[int]) -> dict[str, Tensor]:
            return run.reward.table([prompts[i] for i in alive], [examples[i] for i in rows])

        return race(score, len(prompts), len(examples), run.reward.metric, stream(run.config.seed, "race"))

    def best_so_far(self) -> dict[str, Any] | None:
        """Returns the best on validation of the manual prompt and the K best of the pool."""
        run, manual, metric = self.run, self.run.data.spec.manual_prompt, self.run.reward.metric
        candidates = [manual, *(entry.prompt for entry in self.pool.best(run.config.prompts))]
        values = run.reward.by_example(candidates, run.data.validation)
        best = int(values.mean(1).nan_to_num(-math.inf).argmax())  # the first of equals
        return {
            "prompt": candidates[best],
            "chosen": "manual" if best == 0 else "tuned",
            "chosen_by": f"{metric} on validation, of the manual prompt and the {len(candidates) - 1} best by training "
            "reward; the run was stopped before it had a test score",
            **described(run),
            **split_scores("validation", values[best], values[0]),
        }

    def _shares(self, best: Sequence[dict[str, Any]], manual: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Returns each label's share of the target's answers on test, and of the right answers."""
        given = {"best": [row["answer"] for row in best], "manual": [row["answer"] for row in manual]}
        given["right"] = [example.answer for example in self.run.data.test]
        return {name: shares(listed, self.run.data.words) for name, listed in given.items()}
