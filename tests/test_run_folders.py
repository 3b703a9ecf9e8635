"""Damaged run folders: every command that reads such a folder works, or refuses it in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import compare, evaluate, prompt, push, report, train
from experiments.run.folder import read_jsonl
from rewards.reward import ClassificationReward, RewardResult

SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "steps=2"]
MODES = ("fixed", "tte")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each mode."""
    folders = {mode: tmp_path_factory.mktemp("runs") / mode for mode in MODES}
    for mode, folder in folders.items():
        more = ["examples.batch_size=2", "examples.shots=2"]
        assert train.main(["--task", "mnli", "--mode", mode, "--run", str(folder), *SMALL, *more]) == 0
    return folders


@pytest.fixture
def folder(request: pytest.FixtureRequest, finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged; in mode fixed unless a test asks for tte."""
    return Path(shutil.copytree(finished[getattr(request, "param", "fixed")], tmp_path / "run"))


COMMANDS: dict[str, Callable[[Path], int]] = {
    "evaluate": lambda folder: evaluate.main(["--run", str(folder)]),
    "prompt": lambda folder: prompt.main(["--run", str(folder), "--input", "a", "--answer"]),
    "resume": lambda folder: train.main(["--run", str(folder), "--resume", "--steps", "3"]),
    "report": lambda folder: report.main([str(folder)]),
    "compare": lambda folder: compare.main(["--runs", str(folder)]),
    "push": lambda folder: push.main(["--run", str(folder), "--repo", "me/agent", "--dry-run"]),
}


def said(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command, and its error, which is one line."""
    capsys.readouterr()
    code = COMMANDS[command](folder)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if code:
        assert error.startswith("error: ") and error.count("\n") == 1, error
    return code, error


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    """Changes values in a JSON file of the folder."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(data | values), encoding="utf-8")

    return change


def config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        (folder / "config.yaml").write_text(yaml.safe_dump(data | values), encoding="utf-8")

    return change


def file_for_folder(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).write_text("x", encoding="utf-8")

    return change


ALL = ("evaluate", "prompt", "resume", "report", "compare", "push")
STRICT = ("evaluate", "prompt", "resume", "compare", "push")
USE = ("evaluate", "prompt", "push")
READ = ("evaluate", "prompt", "report", "compare", "push")
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {  # damage, who refuses it, what is named
    "no config": (lambda folder: (folder / "config.yaml").unlink(), ALL, "holds no config.yaml"),
    "empty config": (write("config.yaml", ""), ALL, "config.yaml: expected keys and values, found NoneType"),
    "config that is no YAML": (write("config.yaml", "a: [\n"), ALL, "config.yaml: not YAML"),
    "config not in UTF-8": (write("config.yaml", b"task: caf\xe9\n"), ALL, "config.yaml: cannot be read"),
    "config that is a list": (write("config.yaml", "- 1\n"), ALL, "expected keys and values, found list"),
    "config nested deeply": (write("config.yaml", "a: " + "[" * 9_000), ALL, "config.yaml: not YAML"),
    "config with an unknown key": (config(taks=1), STRICT, "config.yaml: unknown key 'taks'"),
    "config with a wrong value": (config(prompts=-1), STRICT, "config.yaml: prompts is -1"),
    "result that is empty": (write("best_prompt.json", "{}"), READ, "best_prompt.json: 'task' is missing"),
    "result that is a list": (write("best_prompt.json", "[]"), READ, "best_prompt.json: expected a JSON object"),
    "result that is no JSON": (write("best_prompt.json", "{"), READ, "best_prompt.json: not JSON"),
    "result nested deeply": (write("best_prompt.json", "[" * 99_999), READ, "best_prompt.json: not JSON"),
    "result with a number for a prompt": (changed("best_prompt.json", prompt=3), READ, "'prompt' is 3"),
    "result with half a character": (changed("best_prompt.json", prompt="\ud800"), READ, "best_prompt.json: not JSON"),
    "result not in UTF-8": (write("best_prompt.json", b"\xff"), READ, "best_prompt.json: not JSON"),
    "no result": (lambda folder: (folder / "best_prompt.json").unlink(), USE, "holds no best_prompt.json"),
    "agent that is a file": (file_for_folder("agent"), USE, "holds no folder 'agent'"),
    "no agent": (lambda folder: shutil.rmtree(folder / "agent"), USE, "holds no folder 'agent'"),
    "metrics that are no JSON": (write("metrics.jsonl", "{}\nx\n"), ("report", "resume", "compare"), "metrics.jsonl"),
    "checkpoint that is a file": (file_for_folder("checkpoint"), ("resume",), "no checkpoint in"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, refusing, fragment = DAMAGES[damage]
    harm(folder)
    for command in refusing:
        code, error = said(command, folder, capsys)
        assert code == 2 and fragment in error, (command, code, error)


@pytest.mark.parametrize("folder", ["tte"], indirect=True)
def test_a_config_of_another_mode_than_the_result_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("config.yaml", "{}")(folder)
    for command in (*USE, "compare"):
        code, error = said(command, folder, capsys)
        assert code == 2 and "config.yaml says mode fixed, but" in error, (command, code, error)


@pytest.mark.parametrize("edits", [3, [3], [{}], [{"input": 1, "prompt": "a"}]])
@pytest.mark.parametrize("folder", ["tte"], indirect=True)
def test_a_damaged_result_of_edits_is_refused(edits: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed("best_prompt.json", edits=edits)(folder)
    code, error = said("report", folder, capsys)
    assert code == 2 and "edits" in error


def test_an_agent_that_is_a_file_is_one_line_at_the_end_of_a_resumed_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_for_folder("agent")(folder)
    assert COMMANDS["resume"](folder) == 74
    assert f"error: {folder / 'agent'}: File exists" in capsys.readouterr().err


def test_scores_are_printed_even_if_they_cannot_be_stored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in the place of the file makes writing fail, even for root."""
    (folder / "evaluation.json.part").mkdir()
    assert evaluate.main(["--run", str(folder)]) == 74
    captured = capsys.readouterr()
    assert "test score" in captured.out
    assert captured.err == f"error: {folder / 'evaluation.json'}: Is a directory\n"


def test_half_a_character_in_a_file_of_inputs_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"input": "\\ud800"}\n', encoding="utf-8")
    assert prompt.main(["--run", str(folder), "--file", str(tmp_path / "a.jsonl")]) == 2
    assert "a.jsonl:1: " in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**64), "x", "9" * 5_000])
@pytest.mark.parametrize("folder", ["tte"], indirect=True)
def test_a_seed_of_more_than_64_bits_is_refused(seed: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--run", str(folder), "--sampled", "--seed", seed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--seed" in error and error.count("\n") == 1


# -- code that comes with a model --------------------------------------------------------------------------------


def trap(model: Path, mark: Path) -> None:
    """Makes a model's folder name a class in a file of its own, which creates `mark` when it is run."""
    (model / "trap.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Trap: pass\n", encoding="utf-8")
    data = json.loads((model / "config.json").read_text(encoding="utf-8"))
    data |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    (model / "config.json").write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("command", ["evaluate", "prompt"])
def test_a_runs_folder_cannot_have_its_code_run(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap(folder / "agent", tmp_path / "harmed")
    config(trust_remote_code=True)(folder)
    code, error = said(command, folder, capsys)
    assert code == 2 and "trust_remote_code" in error
    assert not (tmp_path / "harmed").exists()


def test_a_resumed_run_runs_no_remote_code_either(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "agent", tmp_path / "model")
    trap(tmp_path / "model", tmp_path / "harmed")
    config(trust_remote_code=True, agent=str(tmp_path / "model"))(folder)
    code, error = said("resume", folder, capsys)
    assert code == 2 and "trust_remote_code" in error
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("command", ["evaluate", "prompt", "resume"])
def test_the_flag_counts_when_it_is_given_to_this_call(command: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "agent", tmp_path / "model")
    model = tmp_path / "model" if command == "resume" else folder / "agent"
    trap(model, tmp_path / "harmed")
    config(agent=str(tmp_path / "model"))(folder)
    given = {
        "evaluate": lambda: evaluate.main(["--run", str(folder), "--trust-remote-code"]),
        "prompt": lambda: prompt.main(["--run", str(folder), "--input", "a", "--trust-remote-code"]),
        "resume": lambda: train.main(["--run", str(folder), "--resume", "--steps", "3", "trust_remote_code=true"]),
    }
    given[command]()
    assert (tmp_path / "harmed").exists()


def test_a_file_of_keys_cannot_ask_for_code_to_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf.yaml").write_text("trust_remote_code: true\n", encoding="utf-8")
    assert train.main(["--config", str(tmp_path / "conf.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert "conf.yaml: trust_remote_code may only be set on the command line" in capsys.readouterr().err


# -- the report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_report_can_be_made_again(mode: str, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished[mode]  # not a copy: a report names the folder where it lies
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes() == page


def test_a_report_of_a_run_that_has_hardly_begun_is_made(folder: Path) -> None:
    for name in ("metrics.jsonl", "prompts.jsonl", "best_prompt.json"):
        (folder / name).unlink()
    assert report.main([str(folder)]) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["iteration", "anchor", "review", "reward_mean", "accuracy_mean", "kl", "prompt", "reward"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(KEYS, JSON), max_size=3), st.lists(st.dictionaries(KEYS, JSON), max_size=3))
def test_rows_of_any_values_make_a_report_or_one_line(
    finished: dict[str, Path], tmp_path: Path, metrics: list[Any], prompts: list[Any]
) -> None:
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    shutil.copy(finished["fixed"] / "config.yaml", folder)
    for name, rows in (("metrics", metrics), ("prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert report.main([str(folder)]) in (0, 2)


# -- rewards that are NaN ----------------------------------------------------------------------------------------


def test_a_run_with_rewards_that_are_none_ends_in_a_report_and_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, calls = ClassificationReward.__call__, []

    def first_none(self: ClassificationReward, prompts: Any, examples: Any) -> RewardResult:
        result = scored(self, prompts, examples)
        if len(examples) != 16:  # not a training batch
            return result
        calls.append(len(prompts))
        if len(calls) == 2:  # in the second iteration all values are NaN
            nothing = result.scores * float("nan")
            return RewardResult(nothing, dict.fromkeys(result.metrics, nothing))
        result.scores[0] = float("nan")
        return result

    monkeypatch.setattr(ClassificationReward, "__call__", first_none)
    folder = tmp_path / "run"
    assert train.main(["--task", "sst2", "--run", str(folder), *SMALL, "steps=3"]) == 0
    assert [row["accuracy_mean"] is None for row in read_jsonl(folder / "metrics.jsonl")] == [False, True, False]
    rewards: dict[str, list[float]] = {}
    for row in read_jsonl(folder / "prompts.jsonl"):
        rewards.setdefault(row["prompt"], []).append(row["reward"])
    never = {prompt for prompt, found in rewards.items() if set(found) == {None}}
    result = json.loads((folder / "best_prompt.json").read_text(encoding="utf-8"))
    assert never and result["prompt"] not in never and result["validation_score"] is not None
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_in_which_no_reward_is_finite_chooses_none_of_its_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = ClassificationReward.__call__

    def none(self: ClassificationReward, prompts: Any, examples: Any) -> RewardResult:
        result = scored(self, prompts, examples)
        return RewardResult(result.scores * float("nan"), result.metrics)

    monkeypatch.setattr(ClassificationReward, "__call__", none)
    code = train.main(["--task", "sst2", "--run", str(tmp_path / "run"), *SMALL])
    assert "Traceback" not in capsys.readouterr().err
    if code == 0:
        result = json.loads((tmp_path / "run" / "best_prompt.json").read_text(encoding="utf-8"))
        assert result["prompt"] == result["manual_prompt"]
    else:
        assert code == 3
