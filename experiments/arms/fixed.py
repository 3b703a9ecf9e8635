"""One prompt for the whole task: APPO as in the paper."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from appo.rollout import Query
from appo.trainer import Iteration
from experiments.arms.arm import Arm, Question
from experiments.arms.result import Outcome, answers, chance, described, predictions, scores, shares, split_scores
from experiments.run.run import Run, stream
from experiments.run.statistics import interval
from tasks.meta_prompt import as_lines, meta_prompt
from tasks.spec import Example

PAPER_POOL = 5  # prompts that the paper runs on test, to report the best of them [P, 4.1]


def meta_query(run: Run, scored: Sequence[Example], rng: random.Random) -> Query:
    """A meta-prompt of training pairs, without the examples in `scored` if enough others remain."""
    known = set(scored)
    others = [example for example in run.data.train if example not in known]
    count = min(run.config.examples.pairs, len(run.data.train))
    pairs = rng.sample(others if len(others) >= count else run.data.train, count)
    return run.policy.query(*meta_prompt(pairs))


class FixedPrompt(Arm):
    """Every iteration asks for K prompts and scores them on the same batch."""

    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """One meta-prompt, K times."""
        query = meta_query(self.run, batch, rng)
        return Question([query], self.run.config.prompts, lambda prompts: self.run.reward(prompts, batch), len(batch))

    def ask_for_review(self, rng: random.Random) -> Question:
        """A meta-prompt for each prompt to be compared."""
        queries = [meta_query(self.run, (), rng) for _ in range(self.run.config.anchor.prompts)]
        rows = self.run.data.validation
        return Question(queries, 1, lambda prompts: self.run.reward(prompts, rows), len(rows))

    def learn(self, question: Question) -> Iteration:
        """As in any arm; adds the prompts to the pool."""
        iteration = super().learn(question)
        self.pool.add(iteration.collected.prompts, iteration.collected.rewarded.scores.tolist())
        return iteration

    def result(self) -> Outcome:
        """Chooses the winner on validation and runs it on test.

        The manual prompt (and few-shot prompts, if wanted) are candidates too, so that the result never scores below
        the manual prompt on validation; in a tie the manual prompt wins. The paper reports the best of the top five
        *on test*, which selects on the test split; `paper_protocol` holds that number, to compare with published
        tables.

        Raises:
            FloatingPointError: no prompt has a finite score.
        """
        run, manual, test = self.run, self.run.data.spec.manual_prompt, self.run.data.test
        rewards_of = {entry.prompt: entry.reward for entry in self.pool.best(run.config.pool)}
        tuned = list(rewards_of)
        shots = self._few_shot_prompts()
        candidates = [manual, *shots, *tuned]
        kinds = ["manual", *["few-shot"] * len(shots), *["tuned"] * len(tuned)]
        table = run.reward.table(candidates, run.data.validation)
        validation = table[run.reward.metric]
        rewards = run.reward.weighed({name: values.mean(1) for name, values in table.items()}).scores
        if not rewards.isfinite().any():
            raise FloatingPointError("no prompt has a finite score on the validation split; see metrics.jsonl")
        rewards, means = rewards.nan_to_num(-math.inf), validation.mean(1).tolist()
        best = max(range(len(candidates)), key=lambda i: (means[i], rewards[i].item(), -i))
        best = best if means[best] > means[0] else 0
        published = tuned[:PAPER_POOL] or [manual]
        others = run.reward.by_example(published, test)
        of_manual, of_best = (answers(run, [prompt] * len(test), test) for prompt in (manual, candidates[best]))
        luckiest = max(others.tolist(), key=sum)
        result = {
            "prompt": candidates[best],
            "chosen": kinds[best],
            **described(run),
            "chance": chance(test),
            **scores(
                {"validation": validation[best], "test": of_best.values},
                {"validation": validation[0], "test": of_manual.values},
            ),
            "answers_on_test": self._shares(of_best.records, of_manual.records) if run.data.words else {},
            "paper_protocol": {
                "name": f"best of the top {len(published)} by training reward, chosen on test",
                "test_score": sum(luckiest) / len(luckiest),
                "test_interval": interval(luckiest),
            },
        }
        listed = [
            {
                "prompt": prompt,
                "kind": kind,
                "reward": rewards_of.get(prompt),
                "validation_score": mean,
                "validation_interval": interval(values),
                "validation_rows": len(values),
            }
            for prompt, kind, mean, values in zip(candidates, kinds, means, validation.tolist(), strict=True)
        ]
        listed.sort(key=lambda row: -row["validation_score"])
        return Outcome(result, listed, predictions(test, of_manual, of_best, run.target.words))

    def best_so_far(self) -> dict[str, Any] | None:
        """The best on validation of the manual prompt and as many prompts of the pool as an iteration scores."""
        run, manual, metric = self.run, self.run.data.spec.manual_prompt, self.run.reward.metric
        candidates = [manual, *(entry.prompt for entry in self.pool.best(run.config.prompts))]
        values = run.reward.by_example(candidates, run.data.validation)
        best = int(values.mean(1).nan_to_num(-math.inf).argmax())  # the first of equals
        return {
            "prompt": candidates[best],
            "chosen": "manual" if best == 0 else "tuned",
            "chosen_by": f"{metric} on validation, of the manual prompt and the {len(candidates) - 1} best by training "
            "reward; the run was stopped, and the test split was not read",
            **described(run),
            **split_scores("validation", values[best], values[0]),
        }

    def _few_shot_prompts(self) -> list[str]:
        """The manual prompt with training pairs behind it, drawn anew for each."""
        config, data = self.run.config, self.run.data
        rng, count = stream(config.seed, "few-shot"), min(config.examples.pairs, len(data.train))
        drawn = [rng.sample(data.train, count) for _ in range(config.few_shot)]
        return [f"{data.spec.manual_prompt}\n{as_lines(pairs)}\n" for pairs in drawn]

    def _shares(self, best: Sequence[dict[str, Any]], manual: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """How the target's answers on test, and the right ones, are spread over the labels."""
        given = {"best": [row["answer"] for row in best], "manual": [row["answer"] for row in manual]}
        given["right"] = [example.answer for example in self.run.data.test]
        return {name: shares(listed, self.run.data.words) for name, listed in given.items()}
