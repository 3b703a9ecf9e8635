"""Bad input through the real command line: one clear line, exit code 2, and nothing half-written.

Each row is numbered by the kind of fault it stands for: 1-15 configuration and command line, 18-25 data, 33-39 models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.models import LAB_DIR
from experiments.train import main
from tests.test_sources import sst2_folder, write

SPEC = """name: mood
description: Is it happy?
fields: {text: []}
label: [label]
verbalizer: {"0": "no", "1": "yes"}
input: "{text}"
manual_prompt: Is it?
files: {train: [rows.jsonl]}
"""


def config(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--config", str(write(folder / "conf.yaml", text))]


def spec(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--task", str(write(folder / "mood.yaml", text))]


def options(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: [*arguments]


def data(name: str, content: str | bytes) -> Callable[[Path], list[str]]:
    """A sound folder for sst2 in which one file is replaced."""

    def build(folder: Path) -> list[str]:
        sst2_folder(folder / "data", train=40)
        (folder / "data" / name).with_suffix(".tsv").unlink(missing_ok=True)
        write(folder / "data" / name, content)
        return ["--task", "sst2", "--data", str(folder / "data")]

    return build


def model(damage: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """The lab's target, damaged."""

    def build(folder: Path) -> list[str]:
        shutil.copytree(LAB_DIR / "target", folder / "model")
        damage(folder / "model")
        return ["--target", str(folder / "model")]

    return build


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


HEADER = "sentence\tlabel\n"
FAULTS: list[tuple[str, Callable[[Path], list[str]], list[str]]] = [
    ("1 unknown key", config("appo: {learnin_rate: 1e-5}"), ["conf.yaml", "learnin_rate", "learning_rate"]),
    ("2 key in the wrong section", config("appo: {shots: 4}"), ["conf.yaml", "shots"]),
    ("3 not a number", options("appo.learning_rate=fast"), ["appo.learning_rate", "'fast'"]),
    ("4 label words that YAML takes for booleans", spec(SPEC.replace('"no"', "no")), ["verbalizer", "in quotes"]),
    ("5 duplicate key", config("seed: 1\nprompts: 3\nseed: 2"), ["'seed'", "line 1", "line 3"]),
    ("6 bad indent", config("appo:\n\tlam: 1"), ["conf.yaml", "line 2"]),
    ("6 not a mapping", config("- 1"), ["conf.yaml", "list"]),
    ("6 empty file", config(""), ["conf.yaml"]),
    ("7 python object", config("seed: !!python/object/apply:os.getpid []"), ["conf.yaml", "constructor"]),
    ("8 clip_range of 0", options("appo.clip_range=0"), ["clip_range", "above 0"]),
    ("8 lam above 1", options("appo.lam=1.5"), ["lam", "between 0 and 1"]),
    ("8 no epochs", options("appo.ppo_epochs=0"), ["ppo_epochs", "at least 1"]),
    ("9 nan", options("appo.learning_rate=.nan"), ["learning_rate", "nan"]),
    ("12 empty value", options("appo.lam="), ["appo.lam=", "key=value"]),
    ("12 no equals sign", options("appo.lam"), ["appo.lam", "key=value"]),
    ("12 unknown path", options("appa.lam=1"), ["appa", "appo"]),
    ("13 unknown task", options("--task", "mnIi"), ["mnIi", "did you mean 'mnli'?"]),
    ("14 resume of nothing", options("--resume"), ["--resume needs --run"]),
    ("18 no data folder", options("--data", "nowhere/at/all"), ["nowhere/at/all"]),
    ("18 no file", lambda folder: ["--task", "sst2", "--data", str(folder)], ["no train file", "train.jsonl"]),
    (
        "19 broken JSON line",
        data("test.jsonl", '{"sentence": "a", "label": 0}\n{"a": \n'),
        ["test.jsonl:2", "not JSON"],
    ),
    ("19 array for an object", data("test.jsonl", "[1]\n"), ["test.jsonl:1", "expected an object"]),
    ("20 missing field", data("test.jsonl", '{"sentence": "a"}\n'), ["test.jsonl:1", "'label'"]),
    ("20 null", data("test.jsonl", '{"sentence": null, "label": 0}\n'), ["test.jsonl:1", "'sentence'", "null"]),
    (
        "21 unknown label",
        data("test.jsonl", '{"sentence": "a", "label": 7}\n'),
        ["test.jsonl:1", "label 7", "negative"],
    ),
    ("22 white space for text", data("test.tsv", HEADER + "  \t0\n"), ["test.tsv:2", "expected some text"]),
    ("23 not UTF-8", data("test.tsv", HEADER.encode() + b"a\xff\t0\n"), ["test.tsv", "not UTF-8 at byte 16"]),
    ("24 too few columns", data("test.tsv", HEADER + "a\n"), ["test.tsv:2", "1 fields", "2 columns"]),
    ("24 unbalanced quote", data("test.csv", 'sentence,label\n"a,0\n'), ["test.csv", "not CSV"]),
    ("25 no rows", data("test.tsv", HEADER), ["test.tsv", "no rows"]),
    ("25 a class is missing", data("train.tsv", HEADER + "a\t0\nb\t0\n"), ["sst2", "label 'no'"]),
    ("33 no such model", options("--target", "./no/such/model"), ["target", "no/such/model"]),
    ("33 a folder without weights", model(lambda f: (f / "model.safetensors").unlink()), ["target", "no weights"]),
    ("33 a folder without config", model(lambda f: (f / "config.json").unlink()), ["target", "config.json"]),
    ("39 weights cut short", model(cut_weights), ["target", "cannot load"]),
    ("17 no such device", options("device=cuda:7"), ["device 'cuda:7' cannot be used"]),
    ("28 prompts too long for the agent", options("sampling.max_new_tokens=5000"), ["context of 1024"]),
]


@pytest.mark.parametrize(("build", "fragments"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_fault_is_one_clear_line_and_leaves_nothing(
    build: Callable[[Path], list[str]], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = build(tmp_path)
    run = [] if arguments == ["--resume"] else ["--run", str(tmp_path / "run")]
    assert main([*arguments, *run]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert all(fragment in captured.err for fragment in fragments), captured.err
    assert captured.out == "" and not (tmp_path / "run").exists()
