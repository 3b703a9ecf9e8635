"""For any content of a run's folder and any arguments, a command ends in an exit code and at most one line.

CI draws the same examples every time; `make fuzz MINUTES=60` draws new ones for an hour.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.train import main as train
from tests.test_fuzz import KEYS, SHARED, TEXTS, YAML_TEXT, text_of
from tests.test_own_task import SMALL, reviews

SLOW = settings(max_examples=settings.default.max_examples // 4, suppress_health_check=SHARED)
CODES = {0, 1, 2, 3, 74}  # done, out of memory, a mistake, unsound or diverged, output cannot be written
FILES = [
    *("config.yaml", "best_prompt.json", "metrics.jsonl", "prompts.jsonl", "agent", "checkpoint"),
    *(f"agent/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")),
    *("agent/model.safetensors", "checkpoint/step-000001/state.pt", "checkpoint/step-000001/manifest.json"),
]
FEW = st.recursive(  # no value here makes a run large
    st.none() | st.booleans() | st.integers(-3, 4) | st.floats() | st.just(10**400) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder may be taken for a hub name, and the tests must not ask the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def ending(command: str, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code of a command; checks that an error is one line without terminal control characters."""
    capsys.readouterr()
    try:
        code = import_module(f"experiments.{command}").main(list(arguments))
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code in CODES, captured.err
    assert "Traceback" not in captured.err
    if code:
        last = captured.err.splitlines()[-1]
        assert last.startswith("error: ") and last.isprintable() and len(last) < 3000
    assert not set(captured.out) & {"\x1b", "\x9b", "\x07", "\r"}
    return code


# -- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a finished run in each mode."""
    runs = {}
    for mode in ("fixed", "tte"):
        folder = tmp_path_factory.mktemp(mode)
        runs[mode] = folder / "run"
        arguments = ["--task", str(reviews(folder)), "--run", str(runs[mode]), *SMALL, f"mode={mode}"]
        assert train([*arguments, "examples.batch_size=2"]) == 0
    return runs


Harm = Callable[[Path], object]


def spliced(place: int, written: bytes, cut: bool) -> Harm:
    """Overwrites a part of a file, and may cut off the rest."""

    def harm(path: Path) -> None:
        content = path.read_bytes()
        start = place % (len(content) + 1)
        path.write_bytes(content[:start] + written + (b"" if cut else content[start + len(written) :]))

    return harm


def with_value(key: int, value: object) -> Harm:
    """Sets one key of a file of keys and values to any value."""

    def harm(path: Path) -> None:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        groups = [data, *(inner for inner in data.values() if isinstance(inner, dict) and inner)]
        group = groups[key % len(groups)]
        group[list(group)[key % len(group)]] = value
        path.write_text(text_of(data), encoding="utf-8")

    return harm


def absent(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    absent(path)
    path.mkdir()


def replaced(content: bytes) -> Harm:
    def harm(path: Path) -> None:
        absent(path)
        path.write_bytes(content)

    return harm


JUNK = st.binary(max_size=8).filter(lambda written: not any(48 <= byte < 58 for byte in written))  # adds no digits
HARMS: st.SearchStrategy[tuple[str, Harm]] = (
    st.tuples(st.sampled_from(FILES[6:] + FILES[:4]), st.builds(spliced, st.integers(0, 10**6), JUNK, st.booleans()))
    | st.tuples(
        st.sampled_from(["config.yaml", "best_prompt.json", "agent/config.json", FILES[-1]]),
        st.builds(with_value, st.integers(0, 100), FEW),
    )
    | st.tuples(
        st.sampled_from(FILES),
        st.builds(replaced, st.binary(max_size=40) | FEW.map(text_of).map(str.encode) | YAML_TEXT.map(str.encode))
        | st.sampled_from([absent, a_folder]),
    )
)


@SLOW
@given(st.sampled_from(["fixed", "tte"]), HARMS, st.sampled_from(["evaluate", "prompt", "report", "train"]))
def test_a_run_folder_of_any_content(
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    harm: tuple[str, Harm],
    command: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[mode], folder)
    name, do_harm = harm
    do_harm(folder / name)
    arguments = {
        "evaluate": ["--run", str(folder)],
        "prompt": ["--run", str(folder), "--input", "review", "--answer"],
        "report": [str(folder)],
        "train": ["--run", str(folder), "--resume", "--steps", "1"],
    }
    try:
        ending(command, arguments[command], capsys)
    finally:
        shutil.rmtree(folder)


# -- command lines -----------------------------------------------------------------------------------------------

PATHS = st.sampled_from(["lab", "./none", "none/at/all/x", ".", "", "/dev/null", "\0", "a" * 300, "tests", "README.md"])
SPECS = st.sampled_from(["sst2", "sum", "mnIi", "none.yaml", "README.md", "tests/none.yml", "", "mmlu/", "\ud800"])
SEEDS = st.integers(-2, 2) | st.just(2**70) | TEXTS
COUNTS = st.integers(-2, 2) | TEXTS
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any] | None]] = {
    "train": {
        **{f"--{name}": PATHS for name in ("agent", "target", "data", "config", "run")},
        "--task": SPECS,
        "--steps": COUNTS,
        "--seed": SEEDS,
        "--resume": None,
        "--help": None,
        "--mode": st.sampled_from(["fixed", "tte", "x", ""]),
    },
    "evaluate": {"--run": PATHS, "--votes": COUNTS, "--vote": TEXTS, "--seed": SEEDS, "--sampled": None},
    "prompt": {"--run": PATHS, "--input": TEXTS, "--file": PATHS, "--answer": None},
    "tasks": {"--show": SPECS, "--data": PATHS, "--list": None, "--check": None},
    "compare": {"--seeds": st.integers(-2, 1) | TEXTS, "--arms": st.just("frozen") | TEXTS, "--task": SPECS},
    "report": {},
}
ASSIGNMENTS = st.builds("{}={}".format, st.sampled_from(KEYS) | TEXTS, FEW.map(text_of) | TEXTS)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command and up to three arguments, most of them its own options."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["option", "assignment", "text"]))
        if kind == "option" and OPTIONS[command]:
            name = draw(st.sampled_from(sorted(OPTIONS[command])))
            value = OPTIONS[command][name]
            words += [name] if value is None else [name, str(draw(value))]
        else:
            words.append(draw(ASSIGNMENTS if kind == "assignment" else TEXTS))
    return command, words


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, so that commands write nowhere else."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@SLOW
@given(command_lines())
def test_a_command_line_of_any_words(
    elsewhere: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture[str], line: tuple[str, list[str]]
) -> None:
    command, words = line
    short = [*SMALL, "examples.test_limit=4", "anchor.prompts=1", "epochs=1"]
    begin = {
        "train": ["--task", "sst2", "--steps", "1", "--run", str(elsewhere / "run"), *short],
        "evaluate": ["--run", str(finished["fixed"])],
        "prompt": ["--run", str(finished["fixed"])],
        "compare": [
            "--task",
            "sst2",
            "--folder",
            str(elsewhere / "compared"),
            "--arms",
            "anchor",
            "--seeds",
            "0",
            *short,
        ],
    }
    try:
        ending(command, [*begin.get(command, []), *words], capsys)
    finally:
        for path in elsewhere.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_fuzzers_folders_and_lines_are_sound(finished: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in finished.values():
        assert all((folder / name).exists() for name in FILES)
        assert json.loads((folder / FILES[-1]).read_text(encoding="utf-8"))["step"] == 1
        assert ending("evaluate", ["--run", str(folder)], capsys) == 0
        assert ending("prompt", ["--run", str(folder), "--input", "review", "--answer"], capsys) == 0
