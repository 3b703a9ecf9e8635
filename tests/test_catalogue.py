"""Specs by name and by file: what a good spec defines, and which message refuses a bad one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.catalogue import load_spec, task_names
from tasks.errors import TaskError
from tasks.spec import TaskSpec
from tests.test_tasks import SPEC, write_spec


def write_text(folder: Path, text: str) -> str:
    path = folder / "mood.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(path: str) -> str:
    """The loader's message about a spec that it refuses."""
    with pytest.raises(TaskError) as caught:
        load_spec(path)
    return str(caught.value)


@pytest.mark.parametrize(("wrong", "near"), [("mnIi", "mnli"), ("SST-2", "sst2"), ("mrcp", "mrpc"), ("RTE", "rte")])
def test_an_unknown_task_gets_the_nearest_name(wrong: str, near: str) -> None:
    assert refusal(wrong).startswith(f"unknown task {wrong!r}; did you mean {near!r}? tasks are ")


def test_an_unknown_task_gets_the_list_of_all_tasks_without_subjects() -> None:
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


def test_a_spec_without_a_kind_of_answer_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer=None)
    assert refusal(path) == f"{path}: expected exactly one of verbalizer, choices, answers; found none"


def test_a_spec_with_two_kinds_of_answers_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, answers=["output"])
    assert refusal(path) == f"{path}: expected exactly one of verbalizer, choices, answers; found verbalizer, answers"


def test_an_unknown_key_gets_the_nearest_one(tmp_path: Path) -> None:
    path = write_spec(tmp_path, manual_promt="Is it?")
    assert refusal(path) == f"{path}: unknown key 'manual_promt'; did you mean 'manual_prompt'?"


def test_an_unknown_key_without_a_near_match_is_refused(tmp_path: Path) -> None:
    path = write_spec(tmp_path, zzz=1)
    assert refusal(path).startswith(f"{path}: unknown key 'zzz'; expected one of name, description, ")


# YAML 1.1 reads bare yes, no, on, off as booleans, and digits as numbers, both as a word and as a label.
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
def test_a_word_with_white_space_around_it_is_refused(word: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, verbalizer={"sad": word, "happy": "yes"})
    assert "expected a word without white space around it" in refusal(path)


@pytest.mark.parametrize(
    "verbalizer", [{"sad": "no"}, {"sad": "no", "happy": "no"}], ids=["one word", "the same word twice"]
)
def test_a_verbalizer_needs_two_different_words(verbalizer: dict[str, str], tmp_path: Path) -> None:
    assert "needs two or more different words" in refusal(write_spec(tmp_path, verbalizer=verbalizer))


TEXT, LIST, LISTS = "text", "a list of texts", "a mapping of names to lists of texts"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("name", 3, TEXT),
        ("input", ["{text}"], TEXT),
        ("manual_prompt", {"a": "b"}, TEXT),
        ("label", "label", LIST),
        ("fields", ["text"], LISTS),
        ("verbalizer", ["no", "yes"], "a mapping of names to texts"),
        ("hub", "nyu-mll/glue", "a mapping of names to texts"),
        ("files", [], LISTS),
        ("drop_labels", "-1", LIST),
        ("max_shots", True, "a whole number"),
        ("shuffle", 1, "true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: Any, kind: str, tmp_path: Path) -> None:
    path = write_spec(tmp_path, **{key: value})
    assert refusal(path) == f"{path}: {key!r} is {value!r}; expected {kind}"


def test_a_number_that_python_does_not_write_is_named(tmp_path: Path) -> None:
    path = write_text(tmp_path, json.dumps(SPEC)[:-1] + ', "max_shots": [0x' + "f" * 5000 + "]}")
    assert refusal(path) == f"{path}: 'max_shots' is a number of thousands of digits; expected a whole number"


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


# A split under an unknown name would never be read, and nothing would say so.
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


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a//b", "/etc", "a/../b", "\x1b[2J"])
def test_a_task_name_must_be_a_folder_name(name: str, tmp_path: Path) -> None:
    assert "cannot be the name of a folder" in refusal(write_spec(tmp_path, name=name))


def test_a_field_with_the_name_of_the_lettered_choices_is_refused(tmp_path: Path) -> None:
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
# Texts on which PyYAML raises something other than its own error.
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


def test_a_spec_may_be_json(tmp_path: Path) -> None:
    # JSON writes characters beyond the first 65536 as surrogate pairs.
    path = write_text(tmp_path, json.dumps(SPEC | {"manual_prompt": "Is it \U0001f600?"}))
    assert load_spec(path).manual_prompt == "Is it \U0001f600?"


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_yaml_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    path = write_text(tmp_path, text)
    assert refusal(path).startswith(f"{path}: not readable as YAML: ")


def test_the_line_break_at_the_end_of_a_block_is_no_part_of_the_manual_prompt(tmp_path: Path) -> None:
    lines = yaml.safe_dump({key: value for key, value in SPEC.items() if key != "manual_prompt"})
    path = write_text(tmp_path, f"{lines}manual_prompt: |\n  Is it happy?\n  Say yes or no.\n")
    assert load_spec(path).manual_prompt == "Is it happy?\nSay yes or no."


def test_a_spec_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mood.yaml").mkdir()
    assert refusal(str(tmp_path / "mood.yaml")) == f"{tmp_path / 'mood.yaml'}: cannot be read: Is a directory"


def test_a_spec_with_a_name_too_long_for_any_file_is_refused() -> None:
    assert "cannot be read: File name too long" in refusal("a" * 300 + ".yaml")


def test_a_spec_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mood.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "not readable as YAML" in refusal(str(path))


def test_a_repeated_key_is_named_with_both_lines(tmp_path: Path) -> None:
    path = write_text(tmp_path, "name: mood\nfields:\n  a: []\n  b: []\n  a: []\n")
    assert refusal(path) == f"{path}: not readable as YAML: the key 'a' is given in line 3 and again in line 5"


def test_a_mapping_may_take_in_another(tmp_path: Path) -> None:
    lines = yaml.safe_dump({key: value for key, value in SPEC.items() if key != "verbalizer"})
    path = write_text(tmp_path, f'{lines}verbalizer: {{<<: {{sad: bad, glad: "yes"}}, sad: "no"}}\n')
    assert load_spec(path).verbalizer == {"sad": "no", "glad": "yes"}


def test_a_spec_that_asks_for_a_python_object_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path, "name: !!python/object/apply:os.system [echo hacked]\n")
    assert "could not determine a constructor" in refusal(path)
