"""Any content of a file is either read, or refused in one line with the error of its layer.

CI draws the same examples every time; `make fuzz MINUTES=60` draws new ones for an hour.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appo.policy import clean
from experiments.config import ConfigError, RunConfig, build_config, to_dict
from experiments.run import checkpoint
from experiments.run.checkpoint import MANIFEST, STATE, CheckpointError
from experiments.tasks import show
from experiments.terminal.command import one_line
from tasks.catalogue import load_spec
from tasks.errors import TaskError
from tasks.rows import read_rows
from tasks.sources import load_task
from tests.test_report import elements, prompt, render, row
from tests.test_tasks import SPEC

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
FUZZ = settings(max_examples=4 * settings.default.max_examples, suppress_health_check=SHARED)

NUMBERS = st.integers(-3, 30) | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63), 1e308])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["{a}", "{prompt} {input}", "\x1b[2J", "\ud800", "\0", "A", "(B)", "0", "../x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
YAML_PARTS = [
    *"abn:{}[]\"'-#&*!|>\n\t 01.,?%@~_=<", "!!int", "!!set", "!!binary ", "!!timestamp ", "!!float ", "!!map ",
    "!!omap ", "!!python/name:os", "2001-02-30", "<<: ", "\\ud800", "&x ", "*x", "12:30", "0x_",
]  # fmt: skip
YAML_TEXT = st.lists(st.sampled_from(YAML_PARTS), max_size=40).map("".join)


def text_of(data: dict[str, Any]) -> str:
    """Keys and values as YAML text; JSON is YAML, except for infinity and NaN."""
    return json.dumps(data).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


def is_one_line(error: Exception) -> bool:
    return str(error).isprintable() and 0 < len(str(error)) < 3000


# -- configurations ----------------------------------------------------------------------------------------------


@FUZZ
@given(YAML_TEXT)
@example("? [a]\n: b")
@example("a: &x [*x]")
@example("{{a: 1}: 2}")
def test_a_config_of_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "conf.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        build_config(file=str(path))
    except ConfigError as error:
        assert "\n" not in str(error)


def dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all keys of a configuration, including groups."""
    inner = [name for key, value in tree.items() if isinstance(value, dict) for name in dotted(value, f"{key}.")]
    return [*(f"{prefix}{key}" for key in tree), *inner]


KEYS = [*dotted(to_dict(RunConfig())), "preset"]


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS) | TEXTS, JSON, max_size=3), st.booleans())
def test_a_config_with_any_value_for_any_key(tmp_path: Path, values: dict[str, Any], assigned: bool) -> None:
    path = tmp_path / "conf.yaml"
    tree: dict[str, Any] = {}
    for key, value in values.items():
        group, dot, name = key.rpartition(".")
        inner = tree.setdefault(group, {}) if dot else tree
        if isinstance(inner, dict):
            inner[name] = value
    path.write_text(text_of(tree), encoding="utf-8")
    try:
        if assigned:
            build_config(assignments=[f"{key}={json.dumps(value)}" for key, value in values.items()])
        else:
            build_config(file=str(path))
    except ConfigError as error:
        assert one_line(error).isprintable()


# -- specs and rows ----------------------------------------------------------------------------------------------

OPTIONAL: dict[str, Any] = {
    "choices": ["choices"],
    "answers": ["label"],
    "metric": "f1",
    "template": "{prompt} {input}",
    "shuffle": True,
    "max_shots": 3,
    "hub": {"path": "a/b"},
    "folder": "a",
    "files": {"train": ["rows.jsonl"]},
    "columns": ["text", "label"],
    "drop_labels": ["-1"],
}
KINDS: dict[str, dict[str, Any]] = {
    "labels": SPEC,
    "choices": SPEC | {"verbalizer": {}, "choices": ["choices"], "input": "{text}\n{choices}"},
    "text": SPEC | {"verbalizer": {}, "answers": ["label", "gold"], "metric": "f1"},
}
SCORES = st.dictionaries(TEXTS | st.sampled_from(["sad", "happy", "x", "y"]), st.integers(0, 1) | JSON, max_size=4)
LISTS = st.lists(TEXTS | st.fixed_dictionaries({"text": TEXTS, "label": TEXTS}) | JSON, max_size=30)
BOTH = st.fixed_dictionaries({"text": LISTS, "label": LISTS})
CELL = JSON | SCORES | LISTS | BOTH | st.sampled_from(["sad", "happy", "9" * 5000, ["x", "y"], {"A": "x", "B": "y"}])


def nearly(sound: dict[str, Any], *more: str) -> st.SearchStrategy[dict[str, Any]]:
    """A sound row with up to two cells replaced or added, of any value; or a row of nothing but such cells."""
    columns = st.sampled_from([*sound, *more])
    return st.builds(lambda new: sound | new, st.dictionaries(columns, CELL, max_size=2)) | st.dictionaries(
        columns, CELL, max_size=6
    )


ROW = nearly({"text": "t", "label": "sad", "gold": "g", "choices": ["x", "y"]}, "A", "B", "C", "sentence")


@FUZZ
@given(YAML_TEXT)
@example("name: &x [*x]\nmembers: 5")
def test_a_spec_of_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mood.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_spec(str(path))
    except TaskError as error:
        assert is_one_line(error)


@FUZZ
@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from([*SPEC, *OPTIONAL, "members"]) | TEXTS, JSON, max_size=2),
    st.sets(st.sampled_from(sorted(OPTIONAL)), max_size=2),
    st.lists(ROW, max_size=3),
)
def test_a_spec_with_any_value_for_any_key(
    tmp_path: Path, kind: str, values: dict[str, Any], more: set[str], rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "mood.yaml"
    path.write_text(text_of(KINDS[kind] | {key: OPTIONAL[key] for key in more} | values), encoding="utf-8")
    try:
        spec = load_spec(str(path))
        for raw in rows:
            found = spec.example(raw, "row 1")
            assert found is None or found.input
    except TaskError as error:
        assert is_one_line(error)


LETTERED = {"question": "q", "A": "x", "B": "y", "answer": "A"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "navigate": {"input": "i", "target_scores": {"True": 1, "False": 0}},
    "ruin_names": {"input": "i", "target_scores": {"x": 1, "y": 0}},
    "question_selection": {"input": "i", "target_scores": {"x": 1, "y": 0, "z": 0}},
    "hyperbaton": {"input": "i\n(A) x\n(B) y", "target": "(A)"},
    "sum": {"input": "1 2", "output": "3"},
    "openbookqa": {
        "fact1": "f",
        "question": {"stem": "q", "choices": [{"text": "x"}, {"text": "y"}]},
        "answerKey": "A",
    },
    "mmlu/anatomy": LETTERED | {"choices": ["x", "y"]},
    "mmlu/virology": LETTERED,
    "common_concept": {"items": ["a", "b"], "all_common_concepts": ["c"]},
    "cause_and_effect": {"cause": "a", "effect": "b"},
    "rhymes": {"input": "a", "output": "b", "other_rhymes": ["c"]},
}


@FUZZ
@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_a_row_of_any_values(task: str, data: st.DataObject) -> None:
    spec, raw = load_spec(task), data.draw(nearly(PUBLISHED[task], "C", "question.stem"))
    try:
        found = spec.example(raw, "row 1")
    except TaskError as error:
        assert str(error).startswith("row 1: ") and is_one_line(error)
    else:
        assert found is None or (found.input and found.answer)
        if found and spec.kind == "choices":
            assert found.choices and 2 <= found.choices <= 26 and found.label is not None
            assert max(found.label, *found.also, 0) < found.choices


@pytest.mark.parametrize("task", sorted(PUBLISHED))
def test_the_fuzzers_rows_are_sound(task: str) -> None:
    assert load_spec(task).example(PUBLISHED[task], "row 1")


# -- files and folders -------------------------------------------------------------------------------------------


@FUZZ
@given(st.sampled_from([".jsonl", ".json", ".tsv", ".csv", ".parquet", ".txt", ""]), st.binary(max_size=80))
@example(".csv", b'"a\n')
@example(".tsv", b"\n\n")
@example(".json", b"[1e999]")
@example(".json", b"[" * 100_000)
@example(".jsonl", b"9" * 5000)
def test_a_data_file_of_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(found, dict) for _, found in read_rows(path))
    except TaskError as error:
        assert str(error).startswith(str(path)) and is_one_line(error)


def as_table(rows: list[dict[str, Any]], separator: str, quoting: int) -> bytes:
    out = io.StringIO()
    columns = sorted({column for found in rows for column in found})
    writer = csv.writer(out, delimiter=separator, quoting=quoting, escapechar="\\")
    writer.writerows([columns, *([found.get(column, "") for column in columns] for found in rows)])
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):  # Arrow cannot hold every row
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["sad", "happy"]}), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps({"examples": rows}).encode(),
    ".csv": lambda rows: as_table(rows, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda rows: as_table(rows, "\t", csv.QUOTE_NONE),
    ".parquet": as_parquet,
}
SOUND = [{"text": f"text {i}", "label": i % 2, "gold": "g", "choices": ["x", "y"]} for i in range(12)]


@FUZZ
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(sorted(WRITERS)),
    st.lists(ROW, max_size=2),
    st.integers(0, 12),
    st.none() | st.tuples(st.integers(0, 10**4), st.binary(max_size=4), st.booleans()),
)
def test_a_folder_with_rows_of_any_values_in_any_format(
    tmp_path: Path, kind: str, suffix: str, rows: list[dict[str, Any]], place: int, harm: tuple[int, bytes, bool] | None
) -> None:
    names = {"train": ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"]}
    spec = tmp_path / "mood.yaml"
    spec.write_text(text_of(KINDS[kind] | {"files": names}), encoding="utf-8")
    content = WRITERS[suffix](SOUND[:place] + rows + SOUND[place:])
    if harm:
        start, written, cut = harm[0] % len(content), harm[1], harm[2]
        content = content[:start] + written + (b"" if cut else content[start + len(written) :])
    for old in tmp_path.glob("rows.*"):
        old.unlink()
    (tmp_path / f"rows{suffix}").write_bytes(content)
    try:
        data = load_task(str(spec), str(tmp_path), shots=2)
        assert data.train and data.validation and data.test
        assert all(line.isprintable() for part in show(str(spec), str(tmp_path)) for line in part.split("\n"))
    except TaskError as error:
        assert is_one_line(error)


PATHS = st.sampled_from(
    [
        *("train.jsonl", "test.csv", "rows.JSONL", "notes.json", "manual_prompt.txt"),
        *("mood/dev.tsv", "mood/train.json", "mood/sub/test.jsonl", "a/train.json", "sub/test.jsonl"),
    ]
)
NAMES = st.sampled_from(
    ["train.jsonl", "../train.jsonl", "a", "rows.JSONL", "\0", "a" * 300, "mood.yaml", "notes.json", ""]
)


@FUZZ
@given(
    st.dictionaries(
        PATHS,
        st.binary(max_size=20)
        | st.just(WRITERS[".jsonl"](SOUND))
        | JSON.map(lambda value: json.dumps({"annotations": [value], "examples": [value]}).encode()),
        max_size=4,
    ),
    st.dictionaries(
        st.sampled_from(["train", "validation", "test", "manual", "val"]), st.lists(NAMES, max_size=2), max_size=3
    ),
    st.sampled_from(["", "a", ".", "..", "\0", "a" * 300]),
)
def test_a_folder_of_any_files(
    tmp_path: Path, files: dict[str, bytes], names: dict[str, list[str]], folder: str
) -> None:
    spec = tmp_path / "mood.yaml"
    spec.write_text(text_of(SPEC | {"files": names, "folder": folder}), encoding="utf-8")
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    try:
        load_task(str(spec), str(tmp_path), shots=1).spec.manual_prompt.encode()
    except TaskError as error:
        assert is_one_line(error)
    finally:
        for path in files:
            (tmp_path / path).unlink()


# -- checkpoints and reports -------------------------------------------------------------------------------------


@FUZZ
@given(st.sampled_from([STATE, MANIFEST]), st.integers(0, 10**4), st.binary(max_size=8), st.booleans())
def test_a_checkpoint_of_any_bytes(tmp_path: Path, name: str, place: int, written: bytes, cut: bool) -> None:
    whole = tmp_path / "step-000001"
    if not whole.exists():
        checkpoint.save(tmp_path, 1, {"number": 1, "weights": torch.arange(9.0)})
    intact = (whole / name).read_bytes()
    place %= len(intact)
    damaged = intact[:place] + written + (b"" if cut else intact[place + len(written) :])
    (whole / name).write_bytes(damaged)
    try:
        assert checkpoint.load(tmp_path).state["weights"].tolist() == list(range(9))
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        (whole / name).write_bytes(intact)


@FUZZ
@given(st.text(max_size=60))
@example("\x1b[2J\x1b]52;c;aGk=\x07\r\b\u202e\u200b\x00")
def test_prompts_of_any_characters_are_one_line_that_no_terminal_obeys(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable() or shown == ""
    assert "\n" not in shown and "\x1b" not in shown


@FUZZ
@given(st.text(max_size=60))
@example("</blockquote><script>alert(1)</script>")
@example("```\n![](http://x)|=cmd %s {} \\")
def test_a_report_of_any_prompt_is_well_formed(tmp_path: Path, text: str) -> None:
    page = render(tmp_path, [row(1)], [prompt(clean(text))], prompt=clean(text))
    names = [name for name, _ in elements(page)]
    assert set(names).isdisjoint({"img", "iframe", "a"}) and names.count("script") == 1  # the page's own


@pytest.mark.parametrize("text", ["a" * 100_000, "\u2028" * 5, "yes\u0000no"])
def test_clean_takes_long_and_odd_text(text: str) -> None:
    assert clean(text) == clean(clean(text))


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": float("-inf")}])
def test_the_fuzzers_yaml_is_yaml(value: dict[str, float]) -> None:
    assert repr(yaml.safe_load(text_of(value))) == repr(value)
