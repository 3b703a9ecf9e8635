"""A run's folder, which overwrites nothing; its files, which read back as written; and the prompt pool."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.arms.choice.pool import PoolEntry, PromptPool
from experiments.config import RunConfig
from experiments.run.files import write_whole
from experiments.run.folder import RunExistsError, RunFolder, RunFolderError, new_folder, read_jsonl
from experiments.train import main as train

NAN, INFINITY = float("nan"), float("inf")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the folder --------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(RunExistsError) as caught:
        RunFolder(tmp_path)
    assert str(caught.value) == f"{str(tmp_path)!r} exists and is not empty; name another run folder"


@pytest.mark.parametrize("name", [".hidden", "folder/"])
def test_a_folder_that_holds_anything_at_all_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused_before_models_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert train(["--task", "sst2", "--run", str(tmp_path / "file" / "run")]) == 74
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path / 'file'}: Not a directory\n" and said.out == ""
    RunFolder(tmp_path / "new" / "run").check_writable()
    assert contents(tmp_path) == {"file": b""}


def test_a_refused_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "best_prompt.json").write_text("mine", encoding="utf-8")
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path)
    assert contents(tmp_path) == {"best_prompt.json": b"mine"}


def test_a_run_that_another_process_made_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")  # both find nothing there
    with one.lock():
        one.write_config({})
    before = contents(tmp_path)
    with pytest.raises(RunExistsError, match="exists and is not empty"), other.lock():
        pass
    assert contents(tmp_path) == before
    with one.lock():  # it is its own
        pass


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_text("a.txt", "a")
    assert contents(tmp_path) == {"a.txt": b"a"}


@pytest.mark.parametrize("limit", [1_000, 10_000])  # a buffer has 8 kB; the rest of a row may be written on closing
def test_a_full_disk_leaves_no_half_line(limit: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", [{"iteration": 1}])
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        much = "x" * 2 * limit
        for write in (
            lambda: folder.append("metrics.jsonl", [{"text": much}]),
            lambda: folder.write_text("a.txt", much),
        ):
            with pytest.raises(OSError, match="too large") as caught:
                write()
            assert str(caught.value.filename).startswith(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_a_file_system_without_locks_is_not_taken_for_a_run_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked \(No locks available\)") as caught, RunFolder(tmp_path).lock():
        pass
    assert str(caught.value.filename).startswith(str(tmp_path))


def test_runs_of_other_seeds_begun_in_the_same_second_have_folders_of_their_own() -> None:
    assert len({new_folder(RunConfig(seed=seed)) for seed in range(3)}) == 3


def test_half_a_last_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"itera', encoding="utf-8")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"iteration": 1}]


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []


# Every kind of write, and the file that it makes.
WRITES: dict[str, Callable[[RunFolder], None]] = {
    "config.yaml": lambda folder: folder.write_config({"seed": 1}),
    "best_prompt.json": lambda folder: folder.write_json("best_prompt.json", {"seed": 1}),
    "report.html": lambda folder: folder.write_text("report.html", "<p>"),
    "metrics.jsonl": lambda folder: folder.append("metrics.jsonl", [{"seed": 1}]),
}


@pytest.mark.parametrize("name", WRITES)
def test_the_first_write_makes_folder_and_file_and_nothing_else(name: str, tmp_path: Path) -> None:
    WRITES[name](RunFolder(tmp_path / "runs" / "new"))
    assert list(contents(tmp_path / "runs" / "new")) == [name]


# -- rows --------------------------------------------------------------------------------------------------------

ROWS = [
    {"iteration": 1, "prompt": "a\nb\r\n\té 日本 🙂", "reward": 0.1},
    {"iteration": 2, "prompt": "", "anchor": None},
]


def test_rows_read_back_as_they_were_appended(tmp_path: Path) -> None:
    RunFolder(tmp_path).append("prompts.jsonl", ROWS)
    assert read_jsonl(tmp_path / "prompts.jsonl") == ROWS


def test_rows_are_added_behind_those_that_are_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("prompts.jsonl", ROWS[:1])
    folder.append("prompts.jsonl", ROWS[1:])
    assert read_jsonl(tmp_path / "prompts.jsonl") == ROWS


def test_appending_no_rows_makes_no_line(tmp_path: Path) -> None:
    RunFolder(tmp_path).append("prompts.jsonl", [])
    assert read_jsonl(tmp_path / "prompts.jsonl") == []


def test_each_row_is_one_line_of_plain_json(tmp_path: Path) -> None:
    RunFolder(tmp_path).append("prompts.jsonl", ROWS)
    lines = (tmp_path / "prompts.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == ROWS and lines[-1] == b""


# Characters that end a line for str.splitlines, but for no JSON reader; JSON escapes only the first three.
@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_prompts_may_hold_any_kind_of_line_break(mark: str, tmp_path: Path) -> None:
    RunFolder(tmp_path).append("prompts.jsonl", [{"prompt": f"a{mark}b"}])
    assert read_jsonl(tmp_path / "prompts.jsonl") == [{"prompt": f"a{mark}b"}]


text = st.text(st.characters(exclude_categories=["Cs"]))  # no lone surrogates, which are not text
rows = st.lists(st.dictionaries(text, text | st.integers() | st.floats(allow_nan=False, allow_infinity=False)))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows)
def test_any_rows_read_back_as_they_were_appended(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "any.jsonl").unlink(missing_ok=True)
    RunFolder(tmp_path).append("any.jsonl", rows)
    assert read_jsonl(tmp_path / "any.jsonl") == rows


def test_a_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"reward": 1{"0" * 308}}}\n{{"reward": 1{"0" * 309}}}\n', encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"rows.jsonl:2: not JSON: a number of 310 digits"):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_numbers_that_json_does_not_know_become_null(value: float, tmp_path: Path) -> None:
    RunFolder(tmp_path).append("metrics.jsonl", [{"kl": value, "reward_mean": 1.0}])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"kl": None, "reward_mean": 1.0}]


def test_numbers_that_json_does_not_know_become_null_wherever_they_stand(tmp_path: Path) -> None:
    RunFolder(tmp_path).append("metrics.jsonl", [{"review": {"scores": [NAN, 0.5], "both": (INFINITY,)}}])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"review": {"scores": [None, 0.5], "both": [None]}}]


def test_a_refused_row_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", [{"kl": 1.0}])
    with pytest.raises(TypeError, match="JSON"):
        folder.append("metrics.jsonl", [{"kl": 2.0}, {"review": tmp_path}])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"kl": 1.0}]


# -- whole files -------------------------------------------------------------------------------------------------


def test_json_reads_back_as_it_was_written(tmp_path: Path) -> None:
    result = {"prompt": "Sag »ja«\n", "test_score": 0.1, "verbalizer": {"b": "yes", "a": "no"}, "run": None}
    RunFolder(tmp_path).write_json("best_prompt.json", result)
    assert json.loads((tmp_path / "best_prompt.json").read_text(encoding="utf-8")) == result


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_json("a.json", {"b": 1, "a": 2})
    assert list(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ["b", "a"]


def test_json_that_is_refused_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("a.json", {"score": 1})
    with pytest.raises(TypeError, match="JSON"):
        folder.write_json("a.json", {"score": tmp_path})
    assert {name: json.loads(data) for name, data in contents(tmp_path).items()} == {"a.json": {"score": 1}}


def test_a_config_reads_back_as_it_was_written_in_its_order(tmp_path: Path) -> None:
    config = {"task": "mnli", "run": None, "appo": {"lam": 0.95, "gamma": 1.0}, "agent": "größer/modell", "on": "yes"}
    RunFolder(tmp_path).write_config(config)
    read = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert (read, list(read)) == (config, list(config))


def test_a_file_that_is_written_again_is_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("report.html", "a longer old text")
    folder.write_text("report.html", "new é")
    assert contents(tmp_path) == {"report.html": "new é".encode()}


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "report.html").symlink_to(Path("there", "real.html"))
    for text in ("old", "new"):  # the file is made, then replaced
        write_whole(tmp_path / "report.html", text)
        assert (tmp_path / "there" / "real.html").read_text(encoding="utf-8") == text
    assert (tmp_path / "report.html").is_symlink()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_text("report.html", "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text("report.html", "new \ud800")  # a lone surrogate cannot be encoded
    assert contents(tmp_path)["report.html"] == b"old"


# -- the pool ----------------------------------------------------------------------------------------------------


def pool(*rounds: tuple[list[str], list[float]]) -> PromptPool:
    made = PromptPool()
    for prompts, rewards in rounds:
        made.add(prompts, rewards)
    return made


def test_the_pool_gives_the_best_prompts_best_first() -> None:
    best = pool((["a", "b", "c"], [1.0, 3.0, 2.0])).best(5)
    assert best == [PoolEntry("b", 3.0, 1), PoolEntry("c", 2.0, 1), PoolEntry("a", 1.0, 1)]


@pytest.mark.parametrize(("size", "prompts"), [(0, []), (1, ["b"]), (2, ["b", "c"]), (9, ["b", "c", "a"])])
def test_the_pool_gives_no_more_than_asked_for(size: int, prompts: list[str]) -> None:
    best = pool((["a", "b", "c"], [1.0, 3.0, 2.0])).best(size)
    assert [entry.prompt for entry in best] == prompts


def test_the_pool_holds_a_prompt_once() -> None:
    # The published code let copies in until its queue was full.
    best = pool((["a", "a", "b"], [1.0, 1.0, 0.5]), (["a"], [1.0])).best(5)
    assert [entry.prompt for entry in best] == ["a", "b"]


def test_a_repeated_prompt_is_worth_the_mean_of_its_rewards() -> None:
    # (1 + 4 + 7) / 3 = 4; a running mean of the last two would be 4.75, the best 7
    assert pool((["a", "a"], [1.0, 4.0]), (["a"], [7.0])).best(1) == [PoolEntry("a", 4.0, 3)]


def test_one_lucky_batch_does_not_make_the_best_prompt() -> None:
    # lucky: (10 + 0) / 2 = 5, below steady's 6
    best = pool((["lucky", "steady"], [10.0, 6.0]), (["lucky", "steady"], [0.0, 6.0])).best(1)
    assert best[0].prompt == "steady"


def test_of_equal_prompts_the_more_often_scored_goes_first() -> None:
    best = pool((["once", "twice"], [2.0, 1.0]), (["twice"], [3.0])).best(2)  # twice: (1 + 3) / 2 = 2
    assert [entry.prompt for entry in best] == ["twice", "once"]


def test_of_equal_prompts_scored_as_often_the_older_goes_first() -> None:
    best = pool((["b", "a"], [2.0, 2.0]), (["0"], [2.0])).best(3)
    assert [entry.prompt for entry in best] == ["b", "a", "0"]


def test_empty_prompts_do_not_enter_the_pool() -> None:
    assert pool((["", "a"], [9.0, 1.0])).best(5) == [PoolEntry("a", 1.0, 1)]


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_a_reward_that_is_not_finite_is_left_out_of_the_pool(bad: float) -> None:
    best = pool((["never", "once", "always"], [bad, bad, 1.0]), (["once"], [3.0])).best(5)
    assert best == [PoolEntry("once", 3.0, 1), PoolEntry("always", 1.0, 1)]


def test_prompts_that_differ_in_case_or_spaces_are_different() -> None:
    assert len(pool((["a b", "A b", "a  b"], [1.0, 1.0, 1.0])).best(5)) == 3


def test_the_pool_needs_a_reward_for_every_prompt() -> None:
    with pytest.raises(ValueError, match="zip"):
        PromptPool().add(["a", "b"], [1.0])


def test_negative_rewards_are_ordered_too() -> None:
    best = pool((["a", "b"], [-0.2, -0.1])).best(2)
    assert [entry.prompt for entry in best] == ["b", "a"]
