"""Tasks: what the specs say, how rows and meta-prompts are rendered, what a bad spec is told, and the splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.catalogue import load_spec, task_names
from tasks.errors import TaskError
from tasks.meta_prompt import meta_prompt
from tasks.spec import SPLITS, Example, TaskSpec, fill
from tasks.splits import TaskData, build_data

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
    """A spec file with keys changed, or left out where the change is None; its path."""
    path = folder / "mood.yaml"
    spec = {key: value for key, value in (SPEC | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return str(path)


def write_text(folder: Path, text: str) -> str:
    path = folder / "mood.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(path: str) -> str:
    """What the loader says of a spec that it refuses."""
    with pytest.raises(TaskError) as caught:
        load_spec(path)
    return str(caught.value)


# -- the six tasks -----------------------------------------------------------------------------------------------

# Class order and words by the data sets' own label numbers (GLUE, SNLI) and the paper's verbalizers.
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


# Row of the data set -> what the target reads.
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


# -- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["neutral", 1, "1"])
def test_labels_are_names_numbers_or_digits(label: str | int) -> None:
    example = load_spec("mnli").example({"premise": "p", "hypothesis": "h", "label": label}, "row 1")
    assert example == Example("premise : p\nhypothesis : h", 1, "maybe")


def test_a_verbalizers_own_name_goes_before_its_index(tmp_path: Path) -> None:
    # Classes named "1" and "0", in this order: the label 0 is the second one.
    spec = load_spec(write_spec(tmp_path, verbalizer={"1": "yes", "0": "no"}))
    assert spec.example({"text": "t", "label": 0}, "row 1") == Example("t", 1, "no")


def test_boolean_labels_are_names_and_not_numbers(tmp_path: Path) -> None:
    # True == 1 in Python, but the class that is called True is the first one here.
    spec = load_spec(write_spec(tmp_path, verbalizer={"True": "yes", "False": "no"}))
    assert spec.example({"text": "t", "label": True}, "row 1") == Example("t", 0, "yes")


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


# -- names and files of specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "near"), [("mnIi", "mnli"), ("SST-2", "sst2"), ("mrcp", "mrpc"), ("RTE", "rte")])
def test_an_unknown_task_gets_the_nearest_name(wrong: str, near: str) -> None:
    assert refusal(wrong).startswith(f"unknown task {wrong!r}; did you mean {near!r}? tasks are ")


def test_an_unknown_task_gets_the_list_of_all_but_for_the_subjects() -> None:
    short = [name for name in task_names() if not name.startswith("mmlu/")]
    assert refusal("xxxxxxxx") == f"unknown task 'xxxxxxxx'; tasks are {', '.join(short)} and those of mmlu/"


@pytest.mark.parametrize("name", ["none.yaml", "none.YML"])
def test_a_spec_file_that_is_not_there_is_not_called_an_unknown_task(name: str, tmp_path: Path) -> None:
    assert refusal(str(tmp_path / name)) == f"no spec file {str(tmp_path / name)!r}"


def test_a_users_own_spec_loads_by_its_path(tmp_path: Path) -> None:
    assert load_spec(write_spec(tmp_path)) == TaskSpec(**SPEC)


@pytest.mark.parametrize("key", [key for key in SPEC if key != "verbalizer"])
def test_a_spec_without_a_required_key_is_refused(key: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, **{key: None})
    assert refusal(path) == f"{path}: missing key {key!r}"


def test_a_spec_that_does_not_say_what_an_answer_is_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer=None)
    assert refusal(path) == f"{path}: expected exactly one of verbalizer, choices, answers; found none"


def test_a_spec_with_two_kinds_of_answers_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, answers=["output"])
    assert refusal(path) == f"{path}: expected exactly one of verbalizer, choices, answers; found verbalizer, answers"


def test_an_unknown_key_gets_the_nearest_one(tmp_path: Path) -> None:
    path = write_spec(tmp_path, manual_promt="Is it?")
    assert refusal(path) == f"{path}: unknown key 'manual_promt'; did you mean 'manual_prompt'?"


def test_an_unknown_key_like_no_other_is_refused_all_the_same(tmp_path: Path) -> None:
    path = write_spec(tmp_path, zzz=1)
    assert refusal(path).startswith(f"{path}: unknown key 'zzz'; expected one of name, description, ")


# YAML 1.1 reads bare yes, no, on, off as booleans, and digits as numbers: as a word and as a label.
@pytest.mark.parametrize(
    ("verbalizer", "fragment"),
    [
        ("{sad: no, happy: yes}", "verbalizer 'sad': False: the word is not text; write the word in quotes"),
        ("{no: bad, yes: good}", "verbalizer False: 'bad': the label is not text; write the label in quotes"),
        ('{0: "no", 1: "yes"}', "verbalizer 0: 'no': the label is not text; write the label in quotes"),
        ('{null: "no", a: "yes"}', "verbalizer None: 'no': the label is not text"),
    ],
)
def test_a_verbalizer_that_yaml_does_not_read_as_text_is_told_what_needs_quotes(
    verbalizer: str, fragment: str, tmp_path: Path
) -> None:
    lines = yaml.safe_dump({key: value for key, value in SPEC.items() if key != "verbalizer"})
    path = write_text(tmp_path, f"{lines}verbalizer: {verbalizer}\n")
    assert fragment in refusal(path)


@pytest.mark.parametrize("word", ["", " ", " no", "no\n"])
def test_a_word_is_not_white_space_nor_has_it_around(word: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer={"sad": word, "happy": "yes"})
    assert "expected a word without white space around it" in refusal(path)


@pytest.mark.parametrize(
    "verbalizer", [{"sad": "no"}, {"sad": "no", "happy": "no"}], ids=["one word", "the same word twice"]
)
def test_a_verbalizer_needs_two_different_words(verbalizer: dict[str, str], tmp_path: Path) -> None:
    assert "needs two or more different words" in refusal(write_spec(tmp_path, verbalizer=verbalizer))


TEXT, LIST, LISTS = "text", "a list of texts", "names with a list of texts each"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("name", 3, TEXT),
        ("input", ["{text}"], TEXT),
        ("manual_prompt", {"a": "b"}, TEXT),
        ("label", "label", LIST),
        ("fields", ["text"], LISTS),
        ("verbalizer", ["no", "yes"], "names with a text each"),
        ("hub", "nyu-mll/glue", "names with a text each"),
        ("files", [], LISTS),
        ("drop_labels", "-1", LIST),
        ("max_shots", True, "a whole number"),
        ("shuffle", 1, "true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: Any, kind: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, **{key: value})
    assert refusal(path) == f"{path}: {key!r} is {value!r}; expected {kind}"


# One level down: a name where a list of names belongs would be read letter by letter, null would fail at the first
# row, and a number never equals a label's text.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fields", {"text": "sentence"}),
        ("fields", {1: ["sentence"]}),
        ("fields", {"text": None}),
        ("files", {"test": "mine.jsonl"}),
        ("hub", {"path": "a/b", "train": 3, "test": "test"}),
        ("label", [3]),
        ("drop_labels", [-1]),
    ],
)
def test_a_wrong_type_inside_a_value_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    assert repr(key) in refusal(write_spec(tmp_path, **{key: value}))


@pytest.mark.parametrize("text", ["{sentence}", "{text} {other}", "no field at all"])
def test_an_input_of_unknown_or_no_fields_names_the_fields(text: str, tmp_path: Path) -> None:
    assert "the fields are ['text']" in refusal(write_spec(tmp_path, input=text))


@pytest.mark.parametrize(
    "template", ["Input : {input} Output :", "{prompt} Output :", "{prompt} {prompt} {input}", "{prompt}{input}{x}", ""]
)
def test_a_template_needs_prompt_and_input_once_each(template: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, template=template)
    assert refusal(path) == f"{path}: 'template' needs {{prompt}} and {{input}}, once each"


# A split that the spec calls by another name would never be read, without a word.
@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("files", {"val": ["a.csv"]}, "unknown key of 'files': 'val'; expected one of train, validation, test, manual"),
        ("files", {"tests": ["a.csv"]}, "unknown key of 'files': 'tests'; did you mean 'test'?"),
        ("hub", {"path": "a/b", "split": "train"}, "unknown key of 'hub': 'split'; expected one of path, name"),
    ],
)
def test_an_unknown_split_is_refused(key: str, value: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    assert fragment in refusal(write_spec(tmp_path, **{key: value}))


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a//b", "/etc", "a/../b"])
def test_a_name_is_that_of_a_folder(name: str, tmp_path: Path) -> None:
    assert "cannot be that of a folder" in refusal(write_spec(tmp_path, name=name))


def test_a_field_named_like_the_lettered_choices_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer=None, choices=["opts"], fields={"choices": []}, input="{choices}")
    assert "a field is called 'choices'" in refusal(path)


def test_a_text_task_without_a_metric_is_told_to_name_one(tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer=None, answers=["output"])
    assert refusal(path).startswith(f"{path}: missing key 'metric'; expected exact_match or ")


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    assert "unknown metric 'f1'; expected accuracy" in refusal(write_spec(tmp_path, metric="f1"))


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("just text\n", "str"), ("", "NoneType")])
def test_a_spec_that_is_no_mapping_is_refused(text: str, kind: str, tmp_path: Path) -> None:
    path = write_text(tmp_path, text)
    assert refusal(path) == f"{path}: expected a mapping of keys to values, found {kind}"


BROKEN = [
    "name: [mood\n",
    "fields:\n\ttext: []\n",  # a tab for indentation
    "name: !!python/object/apply:os.abort []\n",  # a tag that would run code
    'name: "\\ud800"\n',  # half a character
]
# Texts on which PyYAML itself fails with something else than its own error.
UNREADABLE = [
    "a: " + "[" * 5000,
    "".join(" " * i + "a:\n" for i in range(3000)),
    "a: 1" + "0" * 5000,
    "a: 2001-02-30",
    "a: !!bool maybe",
    "a: !!int ''",
    "a: !!float ''",
    "a: !!timestamp soon",
    "a: 0x_",
    "!!set [a]",
    "!!map xy",
    "a: !!binary é",
    "? [a]\n: b",
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_yaml_is_one_line_that_says_where(text: str, tmp_path: Path) -> None:
    path = write_text(tmp_path, text)
    # One line: `.` matches no line break, and re.fullmatch takes all of the text.
    assert re.fullmatch(rf"{re.escape(path)}: not readable as YAML: .*line \d, column \d+.*", refusal(path))


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_yaml_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    path = write_text(tmp_path, text)
    assert refusal(path).startswith(f"{path}: not readable as YAML: ")


def test_a_spec_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mood.yaml").mkdir()
    assert refusal(str(tmp_path / "mood.yaml")) == f"{tmp_path / 'mood.yaml'}: cannot be read: Is a directory"


def test_a_spec_with_a_name_too_long_for_any_file_is_refused() -> None:
    assert "cannot be read: File name too long" in refusal("a" * 300 + ".yaml")


def test_a_spec_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mood.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "not readable as YAML" in refusal(str(path))


# -- splits ------------------------------------------------------------------------------------------------------


def pool(count: int, prefix: str = "text", labels: int = 2) -> list[Example]:
    """`count` distinct examples of each label, label by label."""
    words = ("no", "yes", "maybe")
    return [Example(f"{prefix} {label} {i}", label, words[label]) for label in range(labels) for i in range(count)]


def splits(**options: Any) -> TaskData:
    """Splits of 40 training rows and 10 test rows of each of two labels."""
    return build_data(TaskSpec(**SPEC), {"train": pool(40), "test": pool(10, "test")}, **options)


def inputs(examples: Sequence[Example]) -> set[str]:
    return {" ".join(example.input.lower().split()) for example in examples}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shots", [1, 5, 16])
def test_each_small_split_holds_as_many_shots_of_every_label(split: str, shots: int) -> None:
    assert Counter(e.label for e in getattr(splits(shots=shots), split)) == {0: shots, 1: shots}


def test_sixteen_shots_is_the_default() -> None:
    data = splits()
    assert (len(data.train), len(data.validation)) == (32, 32)  # paper, Table 7: 16 per label, two labels


def test_small_splits_are_not_sorted_by_label() -> None:
    labels = [example.label for example in splits(seed=0).train]
    assert labels not in (sorted(labels), sorted(labels, reverse=True))


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_input(one: str, other: str) -> None:
    data = splits(shots=16)
    assert not inputs(getattr(data, one)) & inputs(getattr(data, other))


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_draws_the_same_splits(split: str) -> None:
    one, other = (splits(seed=3, test_limit=8) for _ in range(2))
    assert getattr(one, split) == getattr(other, split)


@pytest.mark.parametrize("split", SPLITS)
def test_another_seed_draws_other_splits(split: str) -> None:
    one, other = (splits(seed=seed, test_limit=8) for seed in (3, 4))
    assert inputs(getattr(one, split)) != inputs(getattr(other, split))


def test_all_test_rows_are_kept_in_order_by_default() -> None:
    assert list(splits().test) == pool(10, "test")


@pytest.mark.parametrize(("limit", "kept"), [(7, 7), (20, 20), (1000, 20)])
def test_test_limit_is_an_upper_bound(limit: int, kept: int) -> None:
    test = splits(test_limit=limit).test
    assert (len(test), len(set(test) & set(pool(10, "test")))) == (kept, kept)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_differ_in_case_and_spaces_only_count_once(seed: int) -> None:
    # Two different texts a label, each written in three ways: one goes to train and the other to validation.
    ways = ("the cat {}", "The  Cat {}", " the\tcat\n{} ")
    train = [Example(way.format(f"{y}{i}"), y, "") for y in (0, 1) for i in (0, 1) for way in ways]
    data = build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1)}, shots=1, seed=seed)
    assert inputs(data.train) | inputs(data.validation) == {f"the cat {y}{i}" for y in (0, 1) for i in (0, 1)}


def test_a_text_with_two_labels_is_drawn_at_most_once() -> None:
    train = [Example("same", 0, "no"), Example("Same", 1, "yes"), *pool(2)]
    data = build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1, "test")}, shots=1)
    assert not inputs(data.train) & inputs(data.validation)


@pytest.mark.parametrize("seed", range(5))
def test_test_rows_are_never_drawn(seed: int) -> None:
    # Four rows a label; two of them are test rows, in another case and spacing.
    test = [Example(f" TEXT  {label} {i}", label, "") for label in (0, 1) for i in (0, 1)]
    data = build_data(TaskSpec(**SPEC), {"train": pool(4), "test": test}, shots=1, seed=seed)
    assert inputs(data.train) | inputs(data.validation) == {f"text {y} {i}" for y in (0, 1) for i in (2, 3)}


def test_validation_comes_from_its_own_rows_where_there_are_any() -> None:
    rows = {"train": pool(5), "validation": pool(5, "own"), "test": pool(1, "test")}
    data = build_data(TaskSpec(**SPEC), rows, shots=3)
    assert all(example.input.startswith("own") for example in data.validation)


def test_train_comes_from_train_rows_where_validation_has_its_own() -> None:
    rows = {"train": pool(5), "validation": pool(5, "own"), "test": pool(1, "test")}
    assert all(example.input.startswith("text") for example in build_data(TaskSpec(**SPEC), rows, shots=5).train)


def test_validation_rows_that_are_in_train_are_left_out() -> None:
    # All five training rows of a label are drawn; five of validation's ten are the same.
    rows = {"train": pool(5), "validation": [*pool(5), *pool(5, "own")], "test": pool(1, "test")}
    assert inputs(build_data(TaskSpec(**SPEC), rows, shots=5).validation) == inputs(pool(5, "own"))


def test_too_few_rows_name_label_split_and_numbers() -> None:
    train = [*pool(4), Example("one more", 0, "no")]  # 5 sad ones, 4 happy ones
    with pytest.raises(TaskError, match="mood: 4 examples left with label 'yes' for train; 5 shots need 5"):
        build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1, "test")}, shots=5)


def test_too_few_rows_for_validation_count_what_train_has_left() -> None:
    with pytest.raises(TaskError, match="mood: 2 examples left with label 'no' for validation; 3 shots need 3"):
        build_data(TaskSpec(**SPEC), {"train": pool(5), "test": pool(1, "test")}, shots=3)


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_data_with_an_input_in_two_splits_cannot_be_made(splits: tuple[str, str]) -> None:
    rows: Mapping[str, tuple[Example, ...]] = {
        split: (Example(f"{split} only", 0, "no"), *([Example("Shared  one", 0, "no")] if split in splits else []))
        for split in SPLITS
    }
    with pytest.raises(TaskError, match=f"mood: {splits[0]} and {splits[1]} share the input 'shared one'"):
        TaskData(TaskSpec(**SPEC), **rows)


# -- the meta-prompt ---------------------------------------------------------------------------------------------


def test_the_meta_prompt_is_the_papers() -> None:
    # Figure 6, with "two" for "five".
    pairs = [Example("a fine film", 1, "yes"), Example("dull {0}", 0, "no")]
    expected = (
        "I gave a friend an instruction and two inputs.\n"
        "The friend read the instruction and wrote an output for every one of the inputs.\n"
        "Here are the input-output pairs:\n"
        "Input : a fine film Output : yes\n"
        "Input : dull {0} Output : no"
    )
    assert meta_prompt(pairs) == (expected, "The instruction was :")


@pytest.mark.parametrize(
    ("count", "words"), [(1, "one input."), (5, "five inputs."), (10, "ten inputs."), (11, "11 inputs.")]
)
def test_the_meta_prompt_counts_its_pairs_in_words(count: int, words: str) -> None:
    first = meta_prompt(pool(count, labels=1)).request.splitlines()[0]
    assert first == f"I gave a friend an instruction and {words}"


def test_the_meta_prompt_shows_the_pairs_in_the_order_given() -> None:
    pairs = pool(3, labels=1)
    shown = meta_prompt(pairs).request.splitlines()[3:]
    assert shown == [f"Input : {pair.input} Output : {pair.answer}" for pair in pairs]


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    path = write_text(tmp_path, "name: mood\nfields:\n  a: []\n  b: []\n  a: []\n")
    assert refusal(path) == f"{path}: not readable as YAML: the key 'a' stands in line 3 and again in line 5"


def test_a_spec_that_asks_for_a_python_object_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path, "name: !!python/object/apply:os.system [echo hacked]\n")
    assert "could not determine a constructor" in refusal(path)
