"""Test-time editing (TTE-StablePrompt): the agent writes an instruction for each input."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from experiments.arms.arm import Arm, Question
from experiments.arms.choice.result import Outcome, answers, chance, described, predictions, scores
from experiments.arms.editor import editor_of
from experiments.run.run import Run
from experiments.run.statistics import interval
from tasks.spec import SPLITS, Example

EDITS_SHOWN = 5  # instructions for single inputs that the result quotes


class TestTimeEditing(Arm):
    """Every iteration asks for K instructions for each input of a batch and scores each on its own input."""

    __test__ = False  # pytest takes a class named Test... for a collection of tests

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.editor = editor_of(run)

    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """Asks for K prompts for each input of the batch."""
        copies = self.run.config.prompts
        asked = [example for example in batch for _ in range(copies)]
        queries = [self.editor.query(example.input, rng) for example in batch]
        return Question(queries, copies, lambda prompts: self.run.reward.each(prompts, asked))

    def ask_for_review(self, rng: random.Random) -> Question:
        """Asks for one prompt for each validation input."""
        rows = self.run.data.validation
        queries = [self.editor.query(example.input, rng) for example in rows]
        return Question(queries, 1, lambda prompts: self.run.reward.each(prompts, rows))

    def result(self) -> Outcome:
        """Lets the agent write its most likely instruction for every input of validation and test.

        The manual prompt is the result if it scores at least as well on validation; then `prompt` holds it, and
        otherwise null.

        Raises:
            FloatingPointError: neither has a finite score.
        """
        run, manual_prompt = self.run, self.run.data.spec.manual_prompt
        written, edited, by_hand = {}, {}, {}
        for split in SPLITS[1:]:
            examples = getattr(run.data, split)
            written[split] = self.editor.write([example.input for example in examples])
            edited[split] = answers(run, written[split], examples)
            by_hand[split] = answers(run, [manual_prompt] * len(examples), examples)
        edits, manual = ({split: given[split].values for split in given} for given in (edited, by_hand))
        of_edits, of_manual = (split["validation"].mean().nan_to_num(-math.inf) for split in (edits, manual))
        if max(of_edits, of_manual) == -math.inf:
            raise FloatingPointError("no prompt has a finite score on the validation split; see metrics.jsonl")
        better = bool(of_edits > of_manual)
        shown_edits = zip(run.data.test[:EDITS_SHOWN], written["test"], strict=False)
        for record, prompt in zip(edited["test"].records, written["test"], strict=True):
            record["prompt"] = prompt
        result = {
            "prompt": None if better else manual_prompt,
            "chosen": "edits" if better else "manual",
            "edits": [{"input": example.input, "prompt": prompt} for example, prompt in shown_edits],
            "edits_validation_score": edits["validation"].mean().item(),
            "edits_validation_interval": interval(edits["validation"].tolist()),
            "edits_test_score": edits["test"].mean().item(),
            "edits_test_interval": interval(edits["test"].tolist()),
            **described(run),
            "chance": chance(run.data.test),
            **scores(edits if better else manual, manual),
        }
        return Outcome(result, [], predictions(run.data.test, by_hand["test"], edited["test"], run.target.words))
