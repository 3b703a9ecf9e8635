"""The loop of a run, from the first iteration to the result, and the log that it writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from appo.trainer import DivergedError
from experiments.arms.arm import Arm, Step
from experiments.arms.editing import TestTimeEditing
from experiments.arms.edits import PhraseEdits
from experiments.arms.fixed import FixedPrompt
from experiments.arms.given import Given
from experiments.arms.paraphrase import Paraphrase
from experiments.arms.untrained import BestOfN, UntrainedEditing
from experiments.config import GIVEN, TRAINED
from experiments.diagnostics.headroom import look
from experiments.diagnostics.overlap import only_labels, overlap, word_runs
from experiments.page.run_page import render_report
from experiments.run.folder import CANDIDATES, HEADROOM, METRICS, PREDICTIONS, PROMPTS, RESULT, SO_FAR
from experiments.run.loggers import Log, final_scores, loggers
from experiments.run.models import save_agent
from experiments.run.resume import begin, finish, save
from experiments.run.run import Run
from experiments.terminal.console import Progress
from experiments.terminal.signals import Signals, StoppedError

ARMS: dict[str, dict[str, type[Arm]]] = {  # by mode
    "fixed": {
        **dict.fromkeys(TRAINED, FixedPrompt),
        "frozen": BestOfN,
        "paraphrase": Paraphrase,
        "edits": PhraseEdits,
        **dict.fromkeys(GIVEN, Given),
    },
    "tte": {**dict.fromkeys(TRAINED, TestTimeEditing), "frozen": UntrainedEditing},
}


def train(run: Run, quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs all iterations and the final evaluation; returns the content of best_prompt.json.

    Raises:
        StoppedError: a signal came; the iteration was finished, and a checkpoint, a report and the best prompt so far
            were written.
        KeyboardInterrupt: a signal came after the last iteration; the same has been written.
    """
    config = run.config
    arm = arm_of(run)
    done, notes = begin(run, arm, resume)
    for note in [*notes, *_fallbacks(run)]:
        print(f"note: {note}", file=sys.stderr)
    if config.headroom and done == 0 and run.steps:
        seen = look(run, config.headroom)
        run.folder.write_json(HEADROOM, seen.as_json())
        if not quiet:
            print(*seen.lines(), sep="\n", file=sys.stderr, flush=True)
    progress = Progress(run.steps, run.reward.metric, quiet, done)
    with loggers(config, run.folder, done) as log:
        record = Record(run, log)
        with Signals(progress.say) as signals:
            for number in range(done + 1, run.steps + 1):
                step = record.timed(number, arm)
                progress.show(number, step.stats, arm.pool.leader())
                stopped = run.policy.ranks.largest(signals.received)  # maybe only one process got the signal
                if stopped or number == run.steps or number % config.checkpoint_every == 0:
                    save(run, arm, number)
                if stopped:
                    progress.close()
                    _leave(run, arm, number)
                    run.policy.ranks.check_same("the iterations that are done", number)  # all has been written
                    raise StoppedError(stopped)
        progress.close()
        if not quiet:
            what = "scoring the prompt" if config.arm in GIVEN else "choosing the result"
            rows = f"{len(run.data.validation)} validation rows, then {len(run.data.test)} test rows"
            print(f"{what}: {rows}", file=sys.stderr, flush=True)
        return _finish(run, arm, log)


def _finish(run: Run, arm: Arm, log: Log) -> dict[str, Any]:
    """Saves the agent, chooses the result and writes everything about it."""
    try:
        save_agent(run.policy, run.folder.path / "agent")
        result, candidates, predictions = arm.result()
    except KeyboardInterrupt:
        if run.steps and run.policy.ranks.size == 1:  # several processes are stopped apart, and cannot score together
            print("keeping the best prompt so far; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            _leave(run, arm, run.steps)
        raise
    run.folder.write_rows(CANDIDATES, candidates)
    run.folder.write_rows(PREDICTIONS, predictions)
    run.folder.write_json(RESULT, result)
    run.folder.remove(SO_FAR)
    finish(run)
    log(run.steps, final_scores(result))
    _report(run)
    return result


def _leave(run: Run, arm: Arm, number: int) -> None:
    """Writes the report and the best prompt of a run that is stopped after iteration `number`."""
    _report(run)
    if found := arm.best_so_far():
        run.folder.write_json(SO_FAR, {"iteration": number, **found})


def _report(run: Run) -> None:
    if run.folder.written:
        run.folder.write_text("report.html", render_report(run.folder.path, run.reward.metric))


def arm_of(run: Run) -> Arm:
    """Makes the arm that the configuration asks for."""
    return ARMS[run.config.mode][run.config.arm](run)


def _fallbacks(run: Run) -> list[str]:
    """Returns a note for each model that runs slower than others of its size."""
    packed = {"agent": run.policy.lm.packed, "target": run.target.described().get("packed", True)}
    slow = [role for role in packed if not packed[role]]
    return [f"the {role} runs in padded batches: its attention cannot run shared prefixes once" for role in slow]


class Record:
    """Logs iterations: a row of metrics.jsonl each, also sent to `log`, and a row of prompts.jsonl per prompt."""

    def __init__(self, run: Run, log: Log) -> None:
        self.run, self.log = run, log
        self.paid = run.served.cost() if run.served else {}
        self.inputs = word_runs(example.input for example in run.data.train)

    def timed(self, number: int, arm: Arm) -> Step:
        """Runs iteration `number` of the arm and logs it, even if it raises DivergedError."""
        started = time.perf_counter()
        try:
            step = arm.step(number)
        except DivergedError as error:
            self._write(number, Step.of(error.iteration), time.perf_counter() - started, arm.cost)
            self.run.policy.ranks.check_same("the iterations that are done", number)  # the row has been written
            raise
        self._write(number, step, time.perf_counter() - started, arm.cost)
        return step

    def _write(self, number: int, step: Step, seconds: float, cost: Mapping[str, float]) -> None:
        prompts, rewarded, review = step.prompts, step.rewarded, step.review
        bare = sum(only_labels(prompt, self.run.target.words) for prompt in prompts) / len(prompts)
        row: dict[str, Any] = {"iteration": number, **step.stats, "label_list_rate": bare, "seconds": seconds}
        row |= {**cost, **self._requests(), "tokens": step.tokens, "anchor": None}
        if review:
            sides = {side: getattr(review, side)._asdict() for side in ("policy_health", "anchor_health")}
            decision = review.decision.value
            row |= {"anchor": decision, "review": vars(review) | {"decision": decision} | sides}
        self.run.folder.append(METRICS, [row])
        self.log(number, row)
        columns = {"reward": rewarded.scores.tolist()}
        columns |= {name: values.tolist() for name, values in rewarded.metrics.items()}
        rows = []
        for i, prompt in enumerate(prompts):
            worth = {name: values[i] for name, values in columns.items()}
            rows.append({"iteration": number, "prompt": prompt, **worth, "overlap": overlap(prompt, self.inputs)})
        self.run.folder.append(PROMPTS, rows)

    def _requests(self) -> dict[str, int]:
        """Returns the cost of requests to the target's server since the last row; nothing without a server."""
        if self.run.served is None:
            return {}
        before, self.paid = self.paid, self.run.served.cost()
        return {name: self.paid[name] - before[name] for name in self.paid}
