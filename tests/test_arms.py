"""Arms: what each asks and keeps; all score the same number of pairs; a stopped arm resumes from its state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from appo.functional import group_scaled, leave_one_out
from experiments.arms.arm import Step
from experiments.arms.edits import PhraseEdits, phrases
from experiments.arms.paraphrase import Paraphrase
from experiments.config import GIVEN, REFERENCES, RunConfig, build_config
from experiments.config.strict import ConfigError
from experiments.planning import outlook
from experiments.planning.spent import spent
from experiments.run.folder import METRICS, PREDICTIONS, PROMPTS, RunFolder, read_candidates, read_jsonl, read_result
from experiments.run.run import Run, prepare, stream
from experiments.terminal.console import summary
from experiments.train import train
from experiments.tuning.loop import ARMS, arm_of
from experiments.tuning.trial import trial
from rewards.target import Asked
from tasks.errors import TaskError
from tasks.meta_prompt import meta_prompt
from tasks.spec import Example

SMALL = ["prompts=4", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "steps=4"]
SMALL += ["headroom=0", "examples.batch_size=8"]
ITERATING = [arm for arm in ARMS["fixed"] if arm not in (*GIVEN, *REFERENCES)]  # the latter run as appo does
Under = Callable[[str], Run]


@pytest.fixture(scope="module")
def under(tmp_path_factory: pytest.TempPathFactory) -> Under:
    """Makes a run of any arm on models that are loaded once; the agent gets its first weights back each time."""
    folder = tmp_path_factory.mktemp("runs")
    first = prepare(build_config({"task": "sst2", "run": str(folder / "run")}, assignments=SMALL))
    weights = {name: tensor.clone() for name, tensor in first.policy.state_dict().items()}

    def made(arm: str, *more: str) -> Run:
        first.policy.load_state_dict(weights)
        options = {"task": "sst2", "run": str(folder / arm)}
        config = build_config(options, assignments=[*SMALL, f"arm={arm}", *more])
        return replace(first, config=config, folder=type(first.folder)(folder / arm))

    return made


@pytest.mark.parametrize("arm", ITERATING)
def test_every_arm_scores_as_many_prompts_on_as_many_rows(arm: str, under: Under) -> None:
    run = under(arm)
    way = arm_of(run)
    before = torch.cat([weight.flatten() for weight in run.policy.trained().values()])
    steps = [way.step(number) for number in (1, 3)]
    assert [len(step.prompts) for step in steps] == [4, 4]
    after = torch.cat([weight.flatten() for weight in run.policy.trained().values()])
    assert torch.equal(before, after) == (arm in ("frozen", "paraphrase", "edits"))
    assert all({"reward_mean", "reward_max", "accuracy_mean"} <= set(step.stats) for step in steps)
    assert way.cost["answers"] == 8 * len(set(steps[-1].prompts))
    assert len(way.pool.best(100)) >= 1


@pytest.mark.parametrize("arm", ["paraphrase", "edits", "reinforce"])
def test_an_arm_resumes_from_its_state_as_if_it_had_not_stopped(arm: str, under: Under, tmp_path: Path) -> None:
    way = arm_of(under(arm))
    for number in (1, 2):
        way.step(number)
    torch.save(way.state_dict(), tmp_path / "state.pt")  # a copy that shares nothing with the running arm
    expected = [way.step(number).prompts for number in (3, 4)]
    again = arm_of(under(arm))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert [again.step(number).prompts for number in (3, 4)] == expected


def test_an_untrained_arm_resumes_on_another_kind_of_device(under: Under) -> None:
    """The state of a GPU's generator has another size; then the run goes on with random numbers of its own."""
    way = arm_of(under("frozen"))
    before = way.generator.get_state()
    way.go_on({"generator": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(way.generator.get_state(), before)


@pytest.mark.parametrize(("count", "queries"), [(8, 8), (12, 6), (13, 1), (5, 5)])
def test_a_review_shares_its_queries_and_gives_each_prompt_rows_of_its_own(
    count: int, queries: int, under: Under, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = under("appo", f"anchor.prompts={count}", "examples.review_rows=4")
    question = arm_of(run).ask_for_review(stream(0, "review"))
    assert (len(question.queries), question.copies * len(question.queries)) == (queries, count)
    given: list[list[list[str]]] = []

    def judge(asked: Sequence[Asked], examples: Sequence[Example]) -> dict[str, Tensor]:
        given.append([list(inputs) for _, inputs in asked])
        assert [example.input for example in examples] == [text for rows in given[-1] for text in rows]
        return {name: torch.zeros(len(examples)) for name in ("accuracy", "margin")}

    monkeypatch.setattr(run.reward, "judge", judge)
    for side in ("agent", "anchor"):
        assert len(question.reward_fn([f"{side} {i}" for i in range(count)]).scores) == count
    assert given[0] == given[1] and all(len(rows) == 4 for rows in given[0])  # the same rows for both sides
    used = Counter(text for rows in given[0] for text in rows)
    assert max(used.values()) - min(used[example.input] for example in run.data.validation) <= 1


def test_a_review_on_all_rows_answers_a_repeated_prompt_once(under: Under) -> None:
    for more, paid in ((["examples.review_rows=4"], 4), ([], 0)):
        way = arm_of(under("appo", "anchor.prompts=2", *more))
        question = way._counted(way.ask_for_review(stream(0, "review")))
        question.reward_fn(["same", "same"])
        assert way.cost["answers"] == (2 * paid or len(way.run.data.validation))


def test_a_review_counts_the_answers_that_it_asks_for(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 validation rows by 7 are six batches of 7 and one of 6."""
    way = arm_of(under("appo", "anchor.prompts=10", "examples.review_rows=7"))
    assert len(way.run.data.validation) % 7
    judged: list[int] = []
    judge = way.run.reward.judge
    monkeypatch.setattr(way.run.reward, "judge", lambda asked, rows: judged.append(len(rows)) or judge(asked, rows))
    way._counted(way.ask_for_review(stream(0, "review"))).reward_fn([f"prompt {i}" for i in range(10)])
    assert way.cost["answers"] == pytest.approx(sum(judged)) and sum(judged) < 70


# -- given prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "kind"),
    [("manual", "manual"), ("empty", "empty"), ("few_shot", "few-shot"), ("step_by_step", "step-by-step")],
)
def test_a_given_prompt_is_the_result_whatever_its_score(arm: str, kind: str, under: Under) -> None:
    run = under(arm)
    result = train(run, quiet=True)
    manual = run.data.spec.manual_prompt
    begins = "" if arm == "empty" else manual
    assert result["chosen"] == kind and result["prompt"].startswith(begins)
    assert (result["prompt"] == manual) == (arm == "manual") and bool(result["prompt"]) == (arm != "empty")
    assert read_result(run.folder.path)["prompt"] == result["prompt"]
    assert not (run.folder.path / METRICS).exists() and not (run.folder.path / PROMPTS).exists()
    assert (run.folder.path / "report.html").is_file() and read_jsonl(run.folder.path / PREDICTIONS)
    assert result["expected_on_new_rows"] is None and result["paper_protocol"] is None  # nothing was chosen
    assert len(read_candidates(run.folder.path)) == (1 if arm == "manual" else 2)
    told = summary(result, run.folder.path, given=True)
    assert (result["verdict"] in told) == ("the arm's prompt" in told) == (arm != "manual")
    assert not [words for words in ("best prompt found", "flatters", "paper's protocol") if words in told]


# -- paraphrase ------------------------------------------------------------------------------------------------------


def test_the_second_half_rewrites_the_best_prompts(under: Under) -> None:
    way = arm_of(under("paraphrase"))
    assert isinstance(way, Paraphrase)
    way.pool.add(["good", "better", "bad"], [2.0, 3.0, 1.0])
    batch, rng = way.run.data.train[:8], way.streams["pairs"]
    way.number = 2
    assert (len(way.ask(batch, rng).queries), way.ask(batch, rng).copies) == (1, 4)
    way.number = 3
    asked = way.ask(batch, rng)
    texts = [way.run.policy.lm.tokenizer.decode(query.tokens) for query in asked.queries]
    assert asked.copies == 1
    assert [next(word for word in ("better", "good", "bad") if word in text) for text in texts] == [
        "better",
        "good",
    ] * 2


def test_what_is_too_long_for_the_agent_is_not_paraphrased(under: Under) -> None:
    long = "good " * 2000  # the lab's agent reads 1,024 tokens
    way = arm_of(under("paraphrase"))
    way.pool.add(["short", long], [2.0, 3.0])
    way.number = 3
    asked = way.ask(way.run.data.train[:8], way.streams["pairs"])
    assert ["short" in way.run.policy.lm.tokenizer.decode(query.tokens) for query in asked.queries] == [True] * 4
    edits = arm_of(under("edits"))
    assert isinstance(edits, PhraseEdits)
    assert edits._paraphrased([long]) == [long]
    first, second = edits._paraphrased([long, "a good film"])
    assert first == long and second != long


# -- phrase edits ----------------------------------------------------------------------------------------------------


def test_phrases_end_at_punctuation_and_after_four_words() -> None:
    text = "Read it: if it is good news, say so. one two three four five"
    found = phrases(text)
    assert found == ["Read it:", "if it is good", "news,", "say so.", "one two three four", "five"]
    assert " ".join(found) == text and phrases("  ") == []


def test_edits_need_a_prompt_to_edit(under: Under) -> None:
    run = under("edits")
    data = replace(run.data, spec=replace(run.data.spec, manual_prompt=" "))
    with pytest.raises(TaskError, match="the manual prompt is empty"):
        arm_of(replace(run, data=data))


def test_a_dry_run_leaves_a_review_out_of_the_time_of_an_iteration(
    under: Under, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = under("appo", "steps=10"), [0.0]
    arm = arm_of(run)

    def step(number: int) -> None:
        arm.cost["review_seconds"] = 5.0
        clock[0] += 7.0

    monkeypatch.setattr(arm, "step", step)
    monkeypatch.setattr("experiments.tuning.trial.arm_of", lambda run: arm)
    monkeypatch.setattr("experiments.tuning.trial.time.perf_counter", lambda: clock[0])
    assert "about 20 s for 10 iterations of 2 s" in list(trial(run))[-2]


def test_edits_begin_with_the_manual_prompt_and_keep_what_scores_best(under: Under) -> None:
    way = arm_of(under("edits"))
    assert isinstance(way, PhraseEdits)
    bases, steps = [way.base], list[Step]()
    for number in (1, 2, 3):
        steps.append(way.step(number))
        bases.append(way.base)
    assert bases[0] == way.run.data.spec.manual_prompt
    for base, step, following in zip(bases, steps, bases[1:], strict=False):
        scores = step.rewarded.scores.tolist()
        assert step.prompts[0] == base and following == step.prompts[scores.index(max(scores))]


def test_the_sampling_of_phrases_is_not_measured_by_a_plan_for_prompts(under: Under, tmp_path: Path) -> None:
    run = replace(under("edits"), folder=RunFolder(tmp_path / "run"))
    phases = {"seconds": 2.0, "sampling_seconds": 1e-5, "scoring_seconds": 1.0, "tokens": 0}
    run.folder.append(METRICS, [phases, phases])  # nothing was paraphrased
    _, sampling, scoring = spent(run)
    assert "0 tokens a second" in sampling and "machine's rate" not in sampling
    assert scoring.endswith("of the machine's rate")


def test_scoring_is_measured_at_the_rate_of_the_targets_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"task": "sst2", "run": str(tmp_path / "run")}
    run = prepare(build_config(options, assignments=[*SMALL, "target_dtype=bfloat16"]))
    run.folder.append(METRICS, [{"seconds": 2.0, "scoring_seconds": 1.0, "update_seconds": 1.0, "tokens": 4}])
    measure = outlook.measured
    # A machine that is a thousand times as fast in bfloat16.
    rates = {torch.float32: 1e9, torch.bfloat16: 1e12}
    monkeypatch.setattr(
        "experiments.planning.spent.measured", lambda device, dtype: measure(device, dtype)._replace(flops=rates[dtype])
    )
    shares = [float(line.split(", ")[-1].split("%")[0]) for line in list(spent(run))[1:]]
    plan = outlook.plan_of(run)
    assert plan is not None
    work = {line.name: line.value for line in plan.work()}
    assert shares[0] == pytest.approx(100 * work["scoring"] / 1e12, abs=1)
    assert shares[1] > 100 * work["scoring"] / 1e9 / 10  # the update is at the rate of float32


# -- GRPO ------------------------------------------------------------------------------------------------------------


def test_scaled_scores_are_those_of_grpo() -> None:
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 9.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    found = group_scaled(leave_one_out(scores, groups, otherwise=9.0), groups)
    first = scores[:3]
    assert_close(found[:3], (first - first.mean()) / first.std(correction=0), rtol=1e-6, atol=0)
    assert found[3:].tolist() == [0.0, 0.0, 0.0]  # equal scores move nothing


# -- the best prompts in the meta-prompt -----------------------------------------------------------------------------


def test_the_meta_prompt_shows_the_best_prompts_where_it_is_asked_to(under: Under) -> None:
    way = arm_of(under("appo", "show_best=2"))
    batch, rng = way.run.data.train[:8], way.streams["pairs"]
    tokenizer = way.run.policy.lm.tokenizer
    assert "good instructions" not in tokenizer.decode(way.ask(batch, rng).queries[0].tokens)
    way.pool.add(["first", "second", "third"], [3.0, 2.0, 1.0])
    shown = tokenizer.decode(way.ask(batch, rng).queries[0].tokens)
    assert shown.index("first") < shown.index("second") and "third" not in shown
    way.pool.add(["word " * 5000], [9.0])  # fits no context: it is left out, with those after it
    assert "good instructions" not in tokenizer.decode(way.ask(batch, rng).queries[0].tokens)


def test_without_best_prompts_the_meta_prompt_is_the_papers(under: Under) -> None:
    pairs = under("appo").data.train[:2]
    assert meta_prompt(pairs, ()) == meta_prompt(pairs)
    assert meta_prompt(pairs, ["Do it."]).request.endswith(meta_prompt(pairs).request)


# -- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "reference"), [("appo", "anchor"), ("ppo", "previous"), ("rlhf", "initial"), ("none", "none")]
)
@pytest.mark.parametrize("preset", ["lab", "paper", "published"])
def test_arms_of_ppo_differ_in_the_reference_only(arm: str, reference: str, preset: str) -> None:
    config = build_config(assignments=[f"arm={arm}", f"preset={preset}"])
    appo = build_config(assignments=[f"preset={preset}"])
    target = appo.appo.kl_target if arm in ("appo", "rlhf") else None  # there is no KL to adapt to
    assert config == replace(appo, arm=arm, appo=replace(appo.appo, reference=reference, kl_target=target))


def test_user_keys_win_over_the_arm_and_the_arm_wins_over_the_preset() -> None:
    assert build_config(assignments=["arm=reinforce"]).appo.value_coef == 0
    assert build_config(assignments=["arm=reinforce", "appo.value_coef=0.5"]).appo.value_coef == 0.5
    assert build_config(assignments=["arm=grpo", "preset=paper"]).appo.kl_in_loss


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["arm=ppo", "appo.reference=initial"], "appo.reference is 'initial'; expected 'previous' in arm ppo"),
        (["arm=edits", "mode=tte"], "arm is 'edits', which finds one prompt for all inputs; expected mode fixed"),
        (["arm=edits", "prompts=1"], "prompts is 1; expected at least 2 in arm edits"),
        (["arm=apo"], f"arm is 'apo'; expected one of {', '.join(ARMS['fixed'])}"),
        (["frozen=true"], "unknown key 'frozen'; "),
    ],
)
def test_mistakes_name_the_key(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(assignments=assignments)
    assert str(caught.value).startswith(message)


def test_the_default_is_appo() -> None:
    assert RunConfig().arm == build_config().arm == "appo"
