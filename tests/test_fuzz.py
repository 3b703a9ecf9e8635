"""Whatever stands in a file: it is read, or refused in one line by the error of its layer. Nothing else gets out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appo.policy import clean
from experiments import checkpoint
from experiments.checkpoint import MANIFEST, STATE, CheckpointError
from experiments.config import ConfigError, build_config
from tasks.catalogue import load_spec
from tasks.errors import TaskError
from tasks.rows import read_rows
from tasks.sources import load_task
from tests.test_report import elements, prompt, render, row
from tests.test_sources import sst2_folder
from tests.test_tasks import SPEC

FUZZ = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
YAML_TEXT = st.text(alphabet=st.sampled_from("abn:{}[]\"'-#&*!|>\n\t 01.,?%@"), max_size=60)


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
@given(st.sampled_from(sorted(SPEC)), JSON)
def test_a_spec_with_any_value_for_any_key(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "mood.yaml"
    path.write_text(json.dumps(SPEC | {key: value}), encoding="utf-8")
    try:
        load_spec(str(path))
    except TaskError as error:
        assert "\n" not in str(error)


@FUZZ
@given(st.sampled_from(["navigate", "ruin_names", "sum", "openbookqa", "mmlu/anatomy", "common_concept"]), st.data())
def test_a_row_of_any_values(task: str, data: st.DataObject) -> None:
    columns = ["input", "target_scores", "output", "question", "choices", "answer", "fact1", "answerKey", "items"]
    raw = data.draw(st.dictionaries(st.sampled_from([*columns, "all_common_concepts", "A", "B"]), JSON, max_size=6))
    try:
        found = load_spec(task).example(raw, "row 1")
        assert found is None or found.input
    except TaskError as error:
        assert str(error).startswith("row 1: ")


@FUZZ
@given(st.sampled_from([".jsonl", ".json", ".tsv", ".csv", ".parquet"]), st.binary(max_size=80))
@example(".csv", b'"a\n')
@example(".tsv", b"\n\n")
@example(".json", b"[1e999]")
def test_a_data_file_of_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(found, dict) for _, found in read_rows(path))
    except TaskError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


@FUZZ
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_a_table_of_any_cells(tmp_path: Path, cells: list[str]) -> None:
    sst2_folder(tmp_path)
    text = "sentence\tlabel\n" + "\t".join(cells) + "\n"
    (tmp_path / "test.tsv").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_task("sst2", str(tmp_path), shots=2)
    except TaskError as error:
        assert "\n" not in str(error)


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
    assert {name for name, _ in elements(page)}.isdisjoint({"script", "img", "iframe", "a"})


@pytest.mark.parametrize("text", ["a" * 100_000, "\u2028" * 5, "yes\u0000no"])
def test_clean_takes_long_and_odd_text(text: str) -> None:
    assert clean(text) == clean(clean(text))
