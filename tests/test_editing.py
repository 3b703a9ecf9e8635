"""Test-time editing: what the agent is asked, per-input rewards, votes, and the commands that use a run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments import evaluate as evaluate_module
from experiments import prompt as prompt_module
from experiments.arms.editing import TestTimeEditing
from experiments.arms.editor import Editor, editor_of
from experiments.config import build_config
from experiments.evaluate import Vote, evaluate, vote
from experiments.run.run import Run, open_run, prepare
from experiments.train import train
from rewards.reward import ClassificationReward, GenerationReward, Reply
from rewards.target import pairs
from tasks.meta_prompt import rewrite_prompt
from tasks.spec import Example
from tests.conftest import logits_of, plain_sampling, policy_of, sharpen, target_of

TEMPLATE = "{prompt} Input : {input} Output :"
WORDS = ("yes", "no")
EXAMPLES = [Example(f"input number {i}" + " and more" * i, i % 2, WORDS[i % 2]) for i in range(5)]
SMALL = [
    "headroom=0",
    *("mode=tte", "prompts=2", "threads=1", "sampling.max_new_tokens=12", "examples.shots=3", "examples.batch_size=2"),
    *("examples.test_limit=6", "anchor.period=1"),
]


# -- what the agent is asked -------------------------------------------------------------------------------------


def test_the_rewriting_meta_prompt_is_the_papers() -> None:
    pairs = [Example("a", 0, "yes"), Example("b", 1, "no")]
    request, opening = rewrite_prompt(pairs, "c")
    assert request == (
        "Look at the instruction and current input,\nrewrite instruction for current input.\n"
        "Here are the input-output pairs:\nInput : a Output : yes\nInput : b Output : no\nCurrent Input Here : c"
    )
    assert opening == "The Rewritten instruction was :"


def test_a_manual_prompt_to_edit_stands_before_the_pairs() -> None:
    request, _ = rewrite_prompt(EXAMPLES[:1], "c", "Say yes.")
    assert request.splitlines()[2] == "Instruction : Say yes."


@pytest.fixture
def editor(tiny_gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Editor:
    return Editor(policy_of(sharpen(tiny_gpt2), tokenizer, plain_sampling(8)), EXAMPLES, pairs=2)


def test_an_input_is_never_shown_with_its_own_answer(editor: Editor) -> None:
    for seed in range(30):
        query = editor.query(EXAMPLES[0].input, random.Random(seed))
        text = editor.policy.lm.tokenizer.decode(query.tokens)
        assert f"Input : {EXAMPLES[0].input} Output" not in text
        assert text.count(" Output : ") == 2


def test_instructions_do_not_depend_on_who_shares_the_batch(editor: Editor) -> None:
    inputs = [example.input for example in EXAMPLES]
    together = editor.write(inputs)
    assert together == [editor.write([text])[0] for text in inputs]
    assert together[::-1] == editor.write(inputs[::-1])
    assert len(set(together)) > 1


def test_sampled_instructions_repeat_with_their_generator(editor: Editor) -> None:
    inputs = [example.input for example in EXAMPLES]
    one, again, other = (editor.write(inputs, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one == again != other


def test_greedy_takes_the_likeliest_token_at_every_step(editor: Editor) -> None:
    query = editor.query("x", random.Random(0))
    (response,) = editor.policy.sample([query], greedy=True).responses()
    ids = list(query.tokens)
    for token in response.tokens.tolist():
        with torch.no_grad():
            assert int(editor.policy.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


# -- rewards -----------------------------------------------------------------------------------------------------

PROMPTS = ["Judge .", "", "Say it in one word , please .", "Judge .", "x"]


def test_logits_of_pairs_are_the_diagonal_of_all_pairs(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    inputs = [example.input for example in EXAMPLES]
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS)
    grid = logits_of(target, PROMPTS, inputs)
    diagonal = torch.stack([grid[i, i] for i in range(len(inputs))])
    for max_batch_tokens in (16_384, 150, 1):
        target.max_batch_tokens = max_batch_tokens
        assert_close(target.class_logits(pairs(PROMPTS, inputs)), diagonal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_each_prompt_is_scored_on_its_own_input(
    kind: str, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = target_of(sharpen(tiny_llama), tokenizer, TEMPLATE, WORDS if kind == "labels" else ())
    reward = ClassificationReward(target) if kind == "labels" else GenerationReward(target, "f1", likelihood_weight=0.5)
    examples = [Example(e.input, e.label, e.answer, answers=(e.answer,)) for e in EXAMPLES]
    single = reward.each(PROMPTS, examples)
    for i, (text, example) in enumerate(zip(PROMPTS, examples, strict=True)):
        alone = reward([text], [example])
        assert_close(single.scores[i], alone.scores[0], rtol=1e-4, atol=1e-4)
        for name, values in single.metrics.items():
            assert_close(values[i], alone.metrics[name][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
def test_prompts_are_scored_on_examples_of_their_own(
    sizes: tuple[int, ...], tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    reward = ClassificationReward(target_of(sharpen(tiny_llama), tokenizer, TEMPLATE, WORDS))
    own = [[EXAMPLES[(i + j) % len(EXAMPLES)] for j in range(size)] for i, size in enumerate(sizes)]
    found = reward.apart(PROMPTS[:3], own)
    for i, (text, examples) in enumerate(zip(PROMPTS, own, strict=False)):
        alone = reward([text], examples)
        assert_close(found.scores[i], alone.scores[0], rtol=1e-4, atol=1e-4)
        for name, values in found.metrics.items():
            assert_close(values[i], alone.metrics[name][0], rtol=1e-4, atol=1e-4)


# -- votes -------------------------------------------------------------------------------------------------------


def voted(answers: list[list[tuple[float, ...]]], how: Vote) -> list[str]:
    """The votes on N inputs of K answers each, given the probabilities [K][N] of the words a, b and c."""

    def reply(probabilities: tuple[float, ...]) -> Reply:
        offered = dict(zip("abc", probabilities, strict=False))
        return Reply(max(offered, key=lambda word: offered[word]), offered)

    return [vote([reply(p) for p in given], how) for given in zip(*answers, strict=True)]


def test_votes_by_majority_and_by_margin() -> None:
    # Input 1: two of three say a, the surest (.9 - .1) says b. Input 2: one vote each; c has the highest total.
    answers = [
        [(0.6, 0.4, 0.0), (0.5, 0.3, 0.2)],
        [(0.5, 0.4, 0.1), (0.2, 0.5, 0.3)],
        [(0.1, 0.9, 0.0), (0.0, 0.1, 0.9)],
    ]
    assert voted(answers, "majority") == ["a", "c"]
    assert voted(answers, "margin") == ["b", "c"]


def test_a_majority_goes_before_any_probability() -> None:
    assert voted([[(0.51, 0.49)], [(0.51, 0.49)], [(0.0, 1.0)]], "majority") == ["a"]


def test_texts_that_differ_in_case_or_punctuation_only_are_one_answer_and_the_first_of_equals_counts() -> None:
    assert vote([Reply("cat", {}), Reply("Dogs.", {}), Reply("dogs", {})], "majority") == "Dogs."
    assert vote([Reply("cat", {}), Reply("dogs", {})], "majority") == "cat"


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tte"
    train(prepare(build_config({"task": "mnli", "steps": 5, "run": str(folder)}, assignments=SMALL)), quiet=True)
    return folder


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


def test_a_run_leaves_an_agent_that_loads_without_us(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "agent")
    tokenizer = AutoTokenizer.from_pretrained(finished / "agent")
    assert model(torch.tensor([tokenizer("Look")["input_ids"]])).logits.isfinite().all()


def test_the_agent_that_was_left_is_the_one_that_was_scored(finished: Path, run: Run) -> None:
    result = json.loads((finished / "best_prompt.json").read_text())
    written = editor_of(run).write([example.input for example in run.data.test])
    assert [edit["prompt"] for edit in result["edits"]] == written[: len(result["edits"])]
    assert evaluate(run)["test_score"] == pytest.approx(result["test_score"])


def test_every_prompt_of_an_iteration_is_logged(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 9 * 2  # five batches hold all nine training examples, with two prompts for each


def test_the_report_quotes_instructions_with_their_inputs(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count('<div class="prompt">') == 5 and "an instruction for each input" in page


def test_reviews_see_validation_and_the_test_split_is_read_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(build_config({"task": "mnli", "steps": 5, "run": str(tmp_path / "r")}, assignments=SMALL))
    seen: list[str] = []
    answer = run.reward.target.class_logits
    known = {
        split: {example.input for example in getattr(run.data, split)} for split in ("train", "validation", "test")
    }

    def noting(asked: Any) -> Any:
        inputs = {text for _, texts in asked for text in texts}
        seen.append(next(split for split in known if inputs <= known[split]))
        return answer(asked)

    monkeypatch.setattr(run.reward.target, "class_logits", noting)
    train(run, quiet=True)
    # Nine training examples in batches of two make an epoch of five iterations, which ends in one review of policy and
    # anchor. At the end, the agent's prompts and the manual one are each scored once on validation and on test.
    assert seen == ["train"] * 5 + ["validation"] * 2 + ["validation"] * 2 + ["test"] * 2


def test_training_and_use_ask_in_the_same_form(run: Run) -> None:
    batch = run.data.train[:2]
    question = TestTimeEditing(run).ask(batch, random.Random(5))
    rng = random.Random(5)
    assert question.queries == [editor_of(run).query(example.input, rng) for example in batch]
    assert question.copies == 2


@pytest.mark.parametrize("arguments", [[], ["--sampled"], ["--votes", "3"], ["--votes", "2", "--vote", "margin"]])
def test_evaluate_scores_and_shows_the_cost(
    arguments: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_module.main(["--run", str(finished), *arguments]) == 0
    result = json.loads((finished / "evaluation.json").read_text())
    votes = int(arguments[1]) if "--votes" in arguments else 1
    assert 0 <= result["test_score"] <= 1
    assert (result["prompts_written"], result["answers_of_the_target"]) == (6 * votes, 6 * votes)
    shown = capsys.readouterr()
    assert "milliseconds per input" in shown.out and "manual" not in shown.err


def test_evaluate_says_that_it_does_not_score_the_manual_prompt_that_was_chosen(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((folder / "best_prompt.json").read_text())
    (folder / "best_prompt.json").write_text(json.dumps(result | {"prompt": "Say so.", "chosen": "manual"}))
    assert evaluate_module.main(["--run", str(folder)]) == 0
    assert "note: the run chose the manual prompt; the scores here" in capsys.readouterr().err


def test_prompt_prints_an_instruction_and_the_answer(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(finished), "--input", r"premise : a\nhypothesis : b", "--answer"]
    assert prompt_module.main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first and second.startswith("answer: ") and "maybe 0." in second


def test_lines_of_json_are_ascii_where_the_output_is_not_utf8(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("premise : ü\n", encoding="utf-8")
    shown = []
    for utf8 in (True, False):
        monkeypatch.setattr(prompt_module, "is_utf8", lambda _, utf8=utf8: utf8)
        assert prompt_module.main(["--run", str(finished), "--file", str(tmp_path / "a.txt")]) == 0
        shown.append(capsys.readouterr().out)
    assert [line.isascii() for line in shown] == [False, True] and json.loads(shown[0]) == json.loads(shown[1])


def test_prompt_reads_files_of_inputs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("premise : a\\nhypothesis : b\n\npremise : c\\nhypothesis : d\n")
    rows = [{"input": "premise : a\nhypothesis : b"}, {"input": "premise : c\nhypothesis : d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pages = []
    for name in ("a.txt", "a.jsonl"):
        assert prompt_module.main(["--run", str(finished), "--file", str(tmp_path / name), "--answer"]) == 0
        pages.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert pages[0] == pages[1]
    assert [row["input"] for row in pages[0]] == ["premise : a\nhypothesis : b", "premise : c\nhypothesis : d"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in pages[0])


def test_a_fixed_run_has_one_instruction_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fixed"
    options = {"task": "mnli", "steps": 1, "run": str(folder)}
    result = train(prepare(build_config(options, assignments=[*SMALL, "mode=fixed"])), quiet=True)
    (tmp_path / "a.txt").write_text("premise : a\npremise : c\n")
    assert prompt_module.main(["--run", str(folder), "--file", str(tmp_path / "a.txt")]) == 0
    assert {json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()} == {result["prompt"]}
    assert evaluate_module.main(["--run", str(folder)]) == 0
    assert evaluate(open_run(folder))["test_score"] == pytest.approx(result["test_score"])
    monkeypatch.setattr("experiments.run.run.open_run", lambda *_: pytest.fail("loaded first"))
    assert evaluate_module.main(["--run", str(folder), "--votes", "3"]) == 2
    assert "votes need a run in mode tte" in capsys.readouterr().err


def test_a_text_task_can_be_edited_and_voted_on(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    options = {"task": "antonyms", "steps": 1, "run": str(folder)}
    train(prepare(build_config(options, assignments=SMALL)), quiet=True)
    run = open_run(folder)
    assert 0 <= evaluate(run, votes=3)["test_score"] <= 1
    with pytest.raises(ValueError, match="no margin"):
        evaluate(run, votes=2, how="margin")


@pytest.mark.parametrize(
    ("module", "arguments", "fragment"),
    [
        (evaluate_module, ["--run", "nowhere"], "'nowhere' holds no config.yaml"),
        (evaluate_module, ["--run", "{run}", "--votes", "0"], "--votes is 0; expected at least 1"),
        (evaluate_module, ["--run", "{run}", "--vote", "margin"], "give --votes 2 or more"),
        (prompt_module, ["--run", "nowhere", "--input", "x"], "'nowhere' holds no config.yaml"),
        (prompt_module, ["--run", "{run}", "--file", "none.txt"], "no file 'none.txt'"),
        (prompt_module, ["--run", "{run}", "--file", "{empty}"], "the file has no inputs"),
    ],
)
def test_mistakes_are_one_clear_line(
    module: Any,
    arguments: list[str],
    fragment: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    filled = [a.replace("{run}", str(finished)).replace("{empty}", str(tmp_path / "empty.txt")) for a in arguments]
    assert module.main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and fragment in error and error.count("\n") == 1
