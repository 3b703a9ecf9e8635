"""Tasks: the specs of the paper's six tasks, and how rows are rendered or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.catalogue import load_spec, task_names
from tasks.errors import TaskError
from tasks.spec import Example, fill

SPEC: dict[str, Any] = {
    "name": "mood",
    "description": "Is it happy?",
    "fields": {"text": ["sentence"]},
    "label": ["label", "gold"],
    "verbalizer": {"sad": "no", "happy": "yes"},
    "input": "{text}",
    "manual_prompt": "Is the text happy?",
}


def write_spec(folder: Path, **changes: Any) -> str:
    """Writes a spec file with changed keys, without those that are None; returns its path."""
    path = folder / "mood.yaml"
    spec = {key: value for key, value in (SPEC | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return str(path)


# -- the six tasks ----------------------------------------------------------------------------------------------------

# Class order from the data sets' own label numbers (GLUE, SNLI), words from the paper's verbalizers.
NLI = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
ENTAILMENT = {"entailment": "yes", "not_entailment": "no"}
VERBALIZERS = {
    "sst2": {"negative": "no", "positive": "yes"},
    "mrpc": {"not_equivalent": "no", "equivalent": "yes"},
    "rte": ENTAILMENT,
    "qnli": ENTAILMENT,
    "mnli": NLI,
    "snli": NLI,
}


def test_the_six_tasks_of_the_paper_are_there() -> None:
    assert set(VERBALIZERS) <= set(task_names())


@pytest.mark.parametrize("name", task_names())
def test_every_spec_loads_under_its_own_name(name: str) -> None:
    assert load_spec(name).name == name


@pytest.mark.parametrize("name", VERBALIZERS)
def test_label_words_stand_in_the_order_of_the_data_sets_numbers(name: str) -> None:
    assert list(load_spec(name).verbalizer.items()) == list(VERBALIZERS[name].items())


@pytest.mark.parametrize("name", VERBALIZERS)
def test_words_are_the_verbalizers_in_class_order(name: str) -> None:
    assert load_spec(name).words == tuple(VERBALIZERS[name].values())


@pytest.mark.parametrize("name", VERBALIZERS)
def test_every_spec_says_what_it_is_and_what_a_person_would_ask(name: str) -> None:
    spec = load_spec(name)
    assert all(len(text.split()) >= 5 for text in (spec.description, spec.manual_prompt))


@pytest.mark.parametrize("name", VERBALIZERS)
def test_the_manual_prompt_asks_for_every_label_word(name: str) -> None:
    spec = load_spec(name)
    assert [word for word in spec.words if f'"{word}"' not in spec.manual_prompt] == []


@pytest.mark.parametrize("name", VERBALIZERS)
def test_the_template_is_the_papers(name: str) -> None:
    assert load_spec(name).template == "{prompt} Input : {input} Output :"  # paper, 4.1


@pytest.mark.parametrize("name", VERBALIZERS)
def test_every_task_has_a_train_and_a_test_split_on_the_hub(name: str) -> None:
    assert {"path", "train", "test"} <= set(load_spec(name).hub)


# The test split is the one whose labels are public and which the published results used.
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("sst2", "validation"),
        ("mrpc", "test"),
        ("rte", "validation"),
        ("qnli", "validation"),
        ("mnli", "validation_matched"),
        ("snli", "test"),
    ],
)
def test_the_hubs_test_split_is_one_with_labels(name: str, split: str) -> None:
    assert load_spec(name).hub["test"] == split


# Row of the data set -> example.
ROWS: dict[str, tuple[dict[str, Any], Example]] = {
    "sst2": ({"sentence": "a fine film .", "label": 1}, Example("a fine film .", 1, "yes")),
    "mrpc": (
        {"sentence1": "He left .", "sentence2": "He went .", "label": 1},
        Example("sentence1 : He left .\nsentence2 : He went .", 1, "yes"),
    ),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1},
        Example("text : It rains.\nhypothesis : It is wet.", 1, "no"),
    ),
    "qnli": (
        {"question": "Who left?", "sentence": "Ann left.", "label": 0},
        Example("question : Who left?\nsentence : Ann left.", 0, "yes"),
    ),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
        Example("premise : It rains.\nhypothesis : It is dry.", 2, "no"),
    ),
    "snli": (
        {"premise": "A dog runs.", "hypothesis": "A dog is tired.", "label": 1},
        Example("premise : A dog runs.\nhypothesis : A dog is tired.", 1, "maybe"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hub_row_renders_as_pinned(name: str) -> None:
    row, expected = ROWS[name]
    assert load_spec(name).example(row, "row 1") == expected


# Columns as the tasks' own distributions name them.
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mrpc", {"Quality": "1", "#1 String": "He left .", "#2 String": "He went ."}),
        ("rte", {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"}),
        ("mnli", {"sentence1": "It rains.", "sentence2": "It is dry.", "gold_label": "contradiction"}),
        ("snli", {"sentence1": "A dog runs.", "sentence2": "A dog is tired.", "gold_label": "neutral"}),
    ],
)
def test_other_column_names_give_the_same_example(name: str, row: dict[str, str]) -> None:
    assert load_spec(name).example(row, "row 1") == ROWS[name][1]


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["neutral", 1, "1", 1.0])
def test_labels_are_names_numbers_or_digits(label: str | float) -> None:
    example = load_spec("mnli").example({"premise": "p", "hypothesis": "h", "label": label}, "row 1")
    assert example == Example("premise : p\nhypothesis : h", 1, "maybe")


def test_a_verbalizers_own_name_goes_before_its_index(tmp_path: Path) -> None:
    # Classes named "1" and "0", in this order: the label 0 is the second one.
    spec = load_spec(write_spec(tmp_path, verbalizer={"1": "yes", "0": "no"}))
    assert spec.example({"text": "t", "label": 0}, "row 1") == Example("t", 1, "no")


def test_boolean_labels_are_names_and_not_numbers(tmp_path: Path) -> None:
    # True == 1 in Python, but the class named True is the first one here.
    spec = load_spec(write_spec(tmp_path, verbalizer={"True": "yes", "False": "no"}))
    assert spec.example({"text": "t", "label": True}, "row 1") == Example("t", 0, "yes")


@pytest.mark.parametrize(("label", "place"), [(True, 1), (False, 0), ("true", 1)])
def test_boolean_labels_are_found_as_json_and_yaml_spell_them(label: object, place: int, tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, verbalizer={"false": "no", "true": "yes"}))
    assert spec.example({"text": "t", "label": label}, "row 1") == Example("t", place, spec.words[place])


@pytest.mark.parametrize("label", [2.0, "2.0", -1.0, "-1.0"])
def test_whole_numbers_are_labels_as_pandas_writes_them(label: object, tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, verbalizer={"1": "no", "2": "yes"}, drop_labels=["-1"]))
    expected = Example("t", 1, "yes") if float(str(label)) == 2 else None
    assert spec.example({"text": "t", "label": label}, "row 1") == expected


@pytest.mark.parametrize(("label", "place"), [("False", 0), ("tre\u0300s", 1)])
def test_labels_are_found_as_pandas_and_macos_spell_them(label: str, place: int, tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path, verbalizer={"false": "no", "tr\u00e8s": "yes"}))
    assert spec.example({"text": "t", "label": label}, "row 1") == Example("t", place, spec.words[place])


@pytest.mark.parametrize("label", [0, "0", 3])
def test_where_labels_are_numbers_no_number_is_an_index(label: object, tmp_path: Path) -> None:
    # Stars from 1 on: a 0 must not become the first class, which is that of one star.
    spec = load_spec(write_spec(tmp_path, verbalizer={"1": "bad", "2": "good"}))
    with pytest.raises(TaskError) as caught:
        spec.example({"text": "t", "label": label}, "row 1")
    assert str(caught.value) == f"row 1: label {label!r} is not in the verbalizer; expected one of 1, 2"


@pytest.mark.parametrize("label", ["other", 3, "3", -1, "", 1.5])
def test_a_label_outside_the_verbalizer_names_row_label_and_what_is_allowed(label: str | float) -> None:
    with pytest.raises(TaskError) as caught:
        load_spec("mnli").example({"premise": "p", "hypothesis": "h", "label": label}, "rows.jsonl:7")
    expected = (
        f"rows.jsonl:7: label {label!r} is not in the verbalizer; "
        "expected one of entailment, neutral, contradiction, or its index"
    )
    assert str(caught.value) == expected


@pytest.mark.parametrize("label", [-1, "-1", "-"])
def test_rows_whose_label_is_declared_void_are_dropped(label: str | int) -> None:
    assert load_spec("snli").example({"premise": "p", "hypothesis": "h", "label": label}, "row 1") is None


def test_a_void_label_counts_as_wrong_where_it_is_not_declared() -> None:
    with pytest.raises(TaskError, match="label -1 is not in the verbalizer"):
        load_spec("sst2").example({"sentence": "s", "label": -1}, "row 1")


def test_a_missing_column_names_row_and_columns() -> None:
    with pytest.raises(TaskError) as caught:
        load_spec("rte").example({"sentence1": "s", "label": 0, "idx": 3}, "rows.tsv:4")
    expected = "rows.tsv:4: no column 'sentence2' or 'hypothesis'; the columns are sentence1, label, idx"
    assert str(caught.value) == expected


def test_white_space_around_a_columns_name_is_shown() -> None:
    with pytest.raises(TaskError, match="no column 'label'; the columns are sentence1, sentence2, ' label'"):
        load_spec("rte").example({"sentence1": "s", "sentence2": "t", " label": 0}, "rows.csv:2")


@pytest.mark.parametrize(
    "text", ["", " \n\t", [], [""], ["a", ["b"]], {}, {"a": "b"}, True, float("nan"), [None], "\ud800"]
)
def test_a_field_without_text_names_row_and_field(text: Any) -> None:
    with pytest.raises(TaskError, match=r"rows\.csv:2: field 'sentence' is .*; expected some text"):
        load_spec("sst2").example({"sentence": text, "label": 0}, "rows.csv:2")


# What a .csv holds as text is a number in JSON and .parquet.
@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (-1.5, "-1.5"), ("7", "7"), (["a", 1], "a, 1"), (10**400, "1" + 400 * "0")]
)
def test_numbers_are_texts(value: Any, text: str) -> None:
    assert load_spec("sst2").example({"sentence": value, "label": 0}, "row 1") == Example(text, 0, "no")


def test_a_text_that_no_context_holds_is_refused() -> None:
    with pytest.raises(TaskError, match=r"row 1: field 'sentence' has 10000000 characters; expected at most 1000000"):
        load_spec("sst2").example({"sentence": "a" * 10**7, "label": 0}, "row 1")


# A column of scores says which label is right; where it does not, no label is made up.
@pytest.mark.parametrize(
    ("scores", "fragment"),
    [
        ({}, "the scores are {}; expected a number for each name"),
        ({"negative": None}, "the scores are {'negative': None}; expected a number"),
        ({"negative": None, "positive": 1}, "expected a number for each name"),
        ({"negative": float("nan"), "positive": 1}, "expected a number for each name"),
        ({"negative": "1", "positive": "0"}, "expected a number for each name"),
        ({"negative": 0, "positive": 0}, "expected a highest one"),
        ({"negative": 0, "neutral": 1}, "is not in the verbalizer"),
    ],
)
def test_scores_that_name_no_label_are_refused(scores: dict[str, Any], fragment: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_spec("sst2").example({"sentence": "s", "label": scores}, "row 1")
    assert str(caught.value).startswith("row 1: ") and fragment in str(caught.value)


def test_labels_that_share_the_highest_score_are_all_right() -> None:
    found = load_spec("mnli").example(
        {"premise": "p", "hypothesis": "h", "label": {"entailment": 0, "neutral": 1, "contradiction": 1}}, "row 1"
    )
    assert found == Example("premise : p\nhypothesis : h", 1, "maybe", also=(2,))


@pytest.mark.parametrize("label", ["9" * 5000, 10**400, [0], "٣", "00"])
def test_a_label_of_any_kind_is_read_or_refused(label: Any) -> None:
    with pytest.raises(TaskError, match="is not in the verbalizer"):
        load_spec("sst2").example({"sentence": "s", "label": label}, "row 1")


def test_a_message_is_one_printable_line_whatever_it_quotes() -> None:
    with pytest.raises(TaskError) as caught:
        load_spec("sst2").example({"\x1b[2J\n\ud800": "s", "label": "\x1b]0;hi\x07"}, "rows.csv:2")
    assert str(caught.value).isprintable()


def test_a_message_quotes_only_the_beginning_of_what_is_long() -> None:
    row = {f"column {i}" * 50: "s" for i in range(5000)}
    with pytest.raises(TaskError) as caught:
        load_spec("sst2").example(row, "rows.csv:2")
    assert len(str(caught.value)) < 2500


def test_a_null_label_is_not_called_a_missing_column() -> None:
    with pytest.raises(TaskError) as caught:
        load_spec("sst2").example({"sentence": "s", "label": None}, "rows.jsonl:1")
    assert "no column 'label'; the columns are sentence, label" not in str(caught.value)


def test_text_is_stripped_at_its_ends_only() -> None:
    example = load_spec("sst2").example({"sentence": " a  fine\nfilm \n", "label": 0}, "row 1")
    assert example == Example("a  fine\nfilm", 0, "no")


def test_braces_in_a_value_are_just_braces() -> None:
    row = {"premise": "{hypothesis} {0}", "hypothesis": r"{premise} {x} \1", "label": 0}
    example = load_spec("mnli").example(row, "row 1")
    assert example == Example("premise : {hypothesis} {0}\nhypothesis : {premise} {x} \\1", 0, "yes")


def test_fill_puts_every_value_in_its_place() -> None:
    assert fill("{a}-{b}-{a} { }", {"a": "1", "b": "{a}"}) == "1-{a}-1 { }"
