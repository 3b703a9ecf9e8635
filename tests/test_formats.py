"""The paper's other data formats, with their quirks: lettered choices, generated text, families of tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.catalogue import load_spec, task_names
from tasks.errors import TaskError
from tasks.sources import load_task
from tasks.spec import Example, TaskSpec
from tasks.splits import build_data
from tests.test_sources import write

INDUCTION = [
    "active_to_passive", "antonyms", "cause_and_effect", "common_concept", "diff", "first_word_letter",
    "informal_to_formal", "larger_animal", "letters_list", "negation", "num_to_verbal", "orthography_starts_with",
    "rhymes", "second_word_letter", "sentence_similarity", "sentiment", "singular_to_plural", "sum", "synonyms",
    "taxonomy_animal", "translation_en-de", "translation_en-es", "translation_en-fr", "word_in_context",
]  # fmt: skip
BIGBENCH = [
    "causal_judgment", "disambiguation_qa", "dyck_languages", "epistemic_reasoning",
    "gender_inclusive_sentences_german", "hyperbaton", "implicatures", "linguistics_puzzles",
    "logical_fallacy_detection", "movie_recommendation", "navigate", "object_counting", "operators",
    "presuppositions_as_nli", "question_selection", "ruin_names", "snarks", "sports_understanding", "tense", "timedial",
    "winowhy", "word_sorting", "word_unscrambling",
]  # fmt: skip
LABELS = ["agnews", "cb", "cr", "mnli", "mr", "mrpc", "qnli", "rte", "snli", "sst2", "sst5", "subj", "trec", "yelp"]


def example(task: str, row: dict[str, Any]) -> Example:
    found = load_spec(task).example(row, "row 1")
    assert found is not None
    return found


def complaint(task: str, row: dict[str, Any]) -> str:
    with pytest.raises(TaskError) as caught:
        load_spec(task).example(row, "row 1")
    return str(caught.value)


# -- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*INDUCTION, *BIGBENCH, *LABELS, "openbookqa", "mixed"])
def test_every_task_of_the_paper_has_a_spec(name: str) -> None:
    assert load_spec(name).name == name


def test_there_are_57_subjects_and_no_other_tasks() -> None:
    subjects = [name for name in task_names() if name.startswith("mmlu/")]
    assert len(subjects) == 57
    assert set(task_names()) == {*INDUCTION, *BIGBENCH, *LABELS, *subjects, "openbookqa", "mixed"}


@pytest.mark.parametrize(
    ("metric", "tasks"),
    [
        ("f1", ["common_concept", "informal_to_formal"]),
        ("exact_set", ["orthography_starts_with", "taxonomy_animal"]),
        ("contains", ["synonyms"]),
    ],
)
def test_induction_tasks_have_their_metrics(metric: str, tasks: list[str]) -> None:
    assert [name for name in INDUCTION if load_spec(name).metric == metric] == tasks


def test_a_member_is_filled_with_its_name() -> None:
    spec = load_spec("mmlu/high_school_us_history")
    assert "about high school us history" in spec.manual_prompt
    assert spec.hub["name"] == "high_school_us_history"
    assert spec.files["test"] == ["test/high_school_us_history_test.csv"]


@pytest.mark.parametrize("members", ["[a, b]", "5", "{a: 3}", "null", "&x [*x]"])
def test_a_family_of_ones_own_is_told_to_be_single(members: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", f"members: {members}\ndescription: d\n")
    with pytest.raises(TaskError, match="a family of tasks"):
        load_spec(str(path))


# -- choices ----------------------------------------------------------------------------------------------------------

QUESTION = "Question : q ?\nChoice :\n(A) one\n(B) two\n(C) three\n(D) four"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q ?", "A": "one", "B": "two", "C": "three", "D": "four", "answer": "C"},  # its csv
        {"question": "q ?", "choices": ["one", "two", "three", "four"], "answer": 2},  # the hub
    ],
)
def test_mmlu_rows_of_file_and_hub_are_the_same_example(row: dict[str, Any]) -> None:
    assert example("mmlu/anatomy", row) == Example(QUESTION, 2, "C", choices=4)


@pytest.mark.parametrize(
    "row",
    [
        {
            "question": {"stem": "q ?", "choices": [{"text": t, "label": b} for t, b in (("one", "A"), ("two", "B"))]},
            "fact1": "f",
            "answerKey": "B",
        },
        {
            "question_stem": "q ?",
            "choices": {"text": ["one", "two"], "label": ["A", "B"]},
            "fact1": "f",
            "answerKey": "B",
        },
    ],
)
def test_openbookqa_rows_of_file_and_hub_are_the_same_example(row: dict[str, Any]) -> None:
    assert example("openbookqa", row) == Example(
        "Fact : f\nQuestion : q ?\nChoice :\n(A) one\n(B) two", 1, "B", choices=2
    )


def test_scored_choices_may_be_of_any_number_with_several_right() -> None:
    row = {"input": "i", "target_scores": {"x": 0, "y": 1, "z": 1}}
    assert example("ruin_names", row) == Example("i\nChoice :\n(A) x\n(B) y\n(C) z", 1, "B", also=(2,), choices=3)


OWN_QUESTION = {"question": "q", "opts": ["wrong", "right"]}


@pytest.fixture
def own(tmp_path: Path) -> TaskSpec:
    """A user's own questionnaire: choices in one column, the answer in another."""
    return load_spec(str(write(tmp_path / "quiz.yaml", QUIZ)))


QUIZ = """name: quiz
description: Which is right?
fields: {question: []}
choices: [opts]
label: [ans]
input: "{question}\\n{choices}"
manual_prompt: Which is right?
"""


@pytest.mark.parametrize(
    "answer",
    [
        {"right": 1, "wrong": 0},
        {"wrong": 0, "right": 1},
        {"B": 1, "A": 0},
        {" right": True, "wrong ": False},
        "B",
        1,
        1.0,
    ],
)
def test_scores_are_matched_by_the_choices_text_or_letter(answer: Any, own: TaskSpec) -> None:
    assert own.example(OWN_QUESTION | {"ans": answer}, "row 1") == Example("q\n(A) wrong\n(B) right", 1, "B", choices=2)


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        ({"right": 1}, "the scores are {'right': 1}; expected one for each of wrong, right"),
        ({"right": 1, "wrong": 0, "other": 0}, "expected one for each of wrong, right"),
        ({"rihgt": 1, "wrong": 0}, "expected one for each of wrong, right"),
        ({"right": 1, "wrong": 1}, "expected a highest one"),
        ({"right": 1, "wrong": None}, "expected a number for each name"),
        ({}, "expected a number for each name"),
    ],
)
def test_scores_that_are_not_those_of_the_choices_are_refused(answer: Any, fragment: str, own: TaskSpec) -> None:
    with pytest.raises(TaskError) as caught:
        own.example(OWN_QUESTION | {"ans": answer}, "row 1")
    assert str(caught.value).startswith("row 1: the scores are ") and fragment in str(caught.value)


# Some rows of ARC name their choices "1", "2", ...: there the answer "1" is the first choice, not the index 1.
@pytest.mark.parametrize(
    "choices",
    [
        {"text": ["one", "two"], "label": ["1", "2"]},
        [{"text": "one", "label": "1"}, {"text": "two", "label": "2"}],
    ],
)
def test_an_answer_is_called_what_the_row_calls_its_choices(choices: Any, own: TaskSpec) -> None:
    found = own.example({"question": "q", "opts": choices, "ans": "1"}, "row 1")
    assert found == Example("q\n(A) one\n(B) two", 0, "A", choices=2)


def test_more_names_than_choices_name_none_of_them(own: TaskSpec) -> None:
    row = {"question": "q", "opts": {"text": ["one", "two"], "label": ["x", "x", "y"]}, "ans": "B"}
    assert own.example(row, "row 1") == Example("q\n(A) one\n(B) two", 1, "B", choices=2)


def test_choices_by_letter_are_their_texts(own: TaskSpec) -> None:
    found = own.example({"question": "q", "opts": {"A": "one", "B": "two"}, "ans": "B"}, "row 1")
    assert found == Example("q\n(A) one\n(B) two", 1, "B", choices=2)


def test_equal_choices_keep_their_letters_when_their_order_is_drawn(own: TaskSpec) -> None:
    rows = [{"question": f"{i}", "opts": ["a", "a", f"b {i}"], "ans": 2} for i in range(20)]
    found = [replace(own, shuffle=True).example(row, "row 1") for row in rows]
    assert {e.label for e in found if e} == {0, 1, 2}
    assert all(e and f"({e.answer}) b {i}" in e.input.splitlines() for i, e in enumerate(found))


def test_choices_without_scores_need_a_column_of_answers(own: TaskSpec) -> None:
    with pytest.raises(TaskError, match="the choices have no scores, and the spec has no 'label'"):
        replace(own, label=[]).example(OWN_QUESTION, "row 1")


def test_scored_choices_of_a_fixed_list_are_labels() -> None:
    assert example("navigate", {"input": "i", "target_scores": {"True": 0, "False": 1}}) == Example("i", 1, "False")


def test_choices_that_stand_in_the_input_are_found_there() -> None:
    row = {"input": "Which ?\nOptions:\n(A) one\n(B) two", "target": "(B)"}
    found = example("hyperbaton", row)
    assert (found.label, found.answer, found.choices) == (1, "B", 2)
    assert found.input.startswith("Which ?\nOptions:\n(A) one")


def test_an_order_that_gives_the_answer_away_is_drawn_for_each_row_and_stays() -> None:
    rows = [{"input": f"row {i}", "target_scores": {f"right {i}": 1, f"b {i}": 0, f"c {i}": 0}} for i in range(60)]
    first, again = ([example("question_selection", row) for row in rows] for _ in range(2))
    assert first == again
    assert {e.label for e in first} == {0, 1, 2}
    assert all(f"({e.answer}) right {i}\n" in f"{e.input}\n" for i, e in enumerate(first))


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"question": "q", "A": "1", "B": "2", "answer": "E"}, "row 1: answer 'E'; expected a letter up to B"),
        ({"question": "q", "answer": "A"}, "row 1: no column 'choices', no columns A and B"),
        ({"question": "q", "choices": 7, "answer": "A"}, "row 1: the choices are 7; expected a list"),
        ({"question": "q", "choices": ["a", ""], "answer": "A"}, "row 1: field 'choices' is ''; expected some text"),
        ({"question": "q", "choices": ["a", "b"]}, "row 1: no column 'answer'"),
        (
            {"question": "q", "choices": [*"abcdefghijklmnopqrstuvwxyz0"], "answer": 0},
            "row 1: the number of choices is 27",
        ),
        ({"question": "q", "choices": ["a"], "answer": "A"}, "row 1: the number of choices is 1; expected 2 to 26"),
        ({"question": "q", "choices": [], "answer": "A"}, "row 1: the number of choices is 0"),
        ({"question": "q", "choices": [None, "b"], "answer": "A"}, "row 1: field 'choices' is None"),
        ({"question": "q", "choices": {"x": "one", "y": "two"}, "answer": "A"}, "row 1: the choices are {'x': 'one'"),
        ({"question": "q", "choices": ["a", "b"], "answer": [0]}, "row 1: answer [0]; expected a letter up to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": "9" * 5000}, "row 1: answer '999"),
        ({"question": "q", "A": "1", "C": "3", "answer": "C"}, "row 1: the columns of choices are A, C"),
    ],
)
def test_a_malformed_question_names_row_and_fault(row: dict[str, Any], fragment: str) -> None:
    assert complaint("mmlu/anatomy", row).startswith(fragment)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "answers"),
    [
        ("rhymes", {"input": "cat", "output": "hat", "other_rhymes": ["bat", "hat", ""]}, ("hat", "bat")),
        ("translation_en-de", {"input": "a", "output": "x", "possible_translations": ["y", "x"]}, ("x", "y")),
        ("translation_en-de", {"input": "a", "output": "x"}, ("x",)),
        ("common_concept", {"items": ["a", "b"], "all_common_concepts": ["c", "d"]}, ("c", "d")),
        ("object_counting", {"input": "i", "target": ["three", "3"]}, ("three", "3")),
        ("word_sorting", {"input": "b a", "target": "a b"}, ("a b",)),
        ("dyck_languages", {"input": "(", "target_scores": {")": 1, "]": 0}}, (")",)),
    ],
)
def test_all_accepted_answers_are_kept(task: str, row: dict[str, Any], answers: tuple[str, ...]) -> None:
    found = example(task, row)
    assert (found.label, found.answer, found.answers) == (None, answers[0], answers)


def test_lists_of_items_are_joined() -> None:
    assert example("common_concept", {"items": ["a", "b"], "all_common_concepts": ["c"]}).input == "a, b"


def test_cause_and_effect_change_places() -> None:
    found = [example("cause_and_effect", {"cause": f"c{i}", "effect": f"e{i}"}) for i in range(40)]
    orders = [e.input == f"Sentence 1: c{i} Sentence 2: e{i}" for i, e in enumerate(found)]
    assert {*orders} == {True, False}
    assert [e.answers for e in found] == [(f"c{i}",) for i in range(40)]


@pytest.mark.parametrize("answer", [[], [None], [""], "", {}, {"a": None}, {"a": float("nan")}, [["a", {}]], True])
def test_an_answer_that_says_nothing_is_refused(answer: Any) -> None:
    assert complaint("sum", {"input": "1 2", "output": answer}).startswith("row 1: ")


def test_numbers_are_answers() -> None:
    assert example("sum", {"input": "1 2", "output": 3}).answers == ("3",)


def test_a_row_without_an_answer_is_named() -> None:
    assert complaint("sum", {"input": "1 2"}).startswith("row 1: no column 'output'; the columns are input")


# -- files ------------------------------------------------------------------------------------------------------------


def test_induction_files_are_read_from_their_folders_with_the_first_annotation(tmp_path: Path) -> None:
    folder = tmp_path / "instruction_induction"
    rows = {str(i): {"input": f"{i} {i}", "output": str(2 * i)} for i in range(1, 13)}
    tests = {str(i): {"input": f"{i} 1", "output": str(i + 1)} for i in range(20, 24)}
    for part, examples in (("induce", rows), ("execute", tests)):
        text = json.dumps({"metadata": {"num_examples": len(examples)}, "examples": examples})
        write(folder / "raw" / part / "sum.json", text.replace("\n", "\r\n"))
    write(folder / "annotations" / "sum.json", '\ufeff{"annotations": ["add them up", "sum"]}')
    data = load_task("sum", str(tmp_path))
    assert data.spec.manual_prompt == "add them up"
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 6, 4)
    assert {e.input for e in data.test} == {f"{i} 1" for i in range(20, 24)}


def bigbench(folder: Path, task: str, examples: list[dict[str, Any]]) -> str:
    write(folder / "bigbench-ii" / task / "task.json", json.dumps({"canary": "c", "name": task, "examples": examples}))
    return str(folder)


def test_one_pool_is_cut_into_three_stratified_splits(tmp_path: Path) -> None:
    # The first thirty rows all have one label, as in the published file.
    rows = [{"input": f"row {i}", "target_scores": {"Valid": int(i >= 30), "Invalid": int(i < 30)}} for i in range(90)]
    data = load_task("logical_fallacy_detection", bigbench(tmp_path, "logical_fallacy_detection", rows), shots=8)
    for split in (data.train, data.validation):
        assert sorted(e.answer for e in split) == ["Invalid"] * 8 + ["Valid"] * 8
    assert len(data.test) == 90 - 32


def test_letters_of_the_small_splits_are_even(tmp_path: Path) -> None:
    rows = [
        {"input": f"row {i}", "target_scores": {c: int(j == (i % 10 == 0)) for j, c in enumerate("xyz")}}
        for i in range(100)
    ]
    data = load_task("ruin_names", bigbench(tmp_path, "ruin_names", rows), shots=5)
    assert sorted(e.answer for e in data.train) == ["A"] * 5 + ["B"] * 5
    assert data.words == ("A", "B", "C")


def test_few_rows_are_shared_out_among_the_splits(tmp_path: Path) -> None:
    rows = [{"input": f"w{i}", "target": f"a{i}"} for i in range(9)]
    data = load_task("word_sorting", bigbench(tmp_path, "word_sorting", rows))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [3, 3, 3]


def test_mmlu_cells_may_hold_several_lines_and_quotes(tmp_path: Path) -> None:
    rows = "".join(f'"Line one {i}\nline ""two"", {{x}}",a,"b, c",0,d,B\n' for i in range(4))
    write(tmp_path / "mmlu" / "val" / "anatomy_val.csv", rows)
    write(tmp_path / "mmlu" / "test" / "anatomy_test.csv", "q,1,2,3,4,D")
    data = load_task("mmlu/anatomy", str(tmp_path))
    assert data.test == (Example("Question : q\nChoice :\n(A) 1\n(B) 2\n(C) 3\n(D) 4", 3, "D", choices=4),)
    assert 'line "two", {x}\nChoice :\n(A) a\n(B) b, c' in data.train[0].input


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "task.json:1: not JSON: "),
        ("3", "task.json: expected a list of objects, or an object with 'examples'"),
        (
            '{"data": [{"input": "a", "target": "b"}]}',
            "task.json: expected a list of objects, or an object with 'examples'",
        ),
        ('{"examples": 3}', "task.json: expected a list of objects, or an object with 'examples'"),
        ('{"examples": []}', "task.json: the file has no rows"),
        ('{"examples": [{"input": "a", "target": "b"}, 4]}', "task.json:2: expected an object, found int"),
        (
            '{"examples": [{"input": "a", "target": "b"}, {"input": "", "target": "b"}]}',
            "task.json:2: field 'input' is ''",
        ),
        ('{"examples": [{"input": "a", "target": "b"}]}', "word_sorting: no examples left for train"),
    ],
)
def test_a_malformed_json_file_is_one_clear_line(text: str, fragment: str, tmp_path: Path) -> None:
    write(tmp_path / "bigbench-ii" / "word_sorting" / "task.json", text)
    with pytest.raises(TaskError) as caught:
        load_task("word_sorting", str(tmp_path))
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_inputs_of_train_that_are_in_test_as_well_are_counted_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = {
        "train": [Example(f"{i}", None, "a", answers=("a",)) for i in range(10)],
        "test": [Example(f"{i}", None, "a", answers=("a",)) for i in range(8, 14)],
    }
    data = build_data(load_spec("sum"), rows)
    assert len(data.train) == len(data.validation) == 4
    assert [r.getMessage() for r in caplog.records] == ["sum: 2 inputs of train are in test as well; left out of train"]


def test_max_shots_bounds_the_examples_per_label() -> None:
    rows = {"train": [Example(f"{i}", i % 3, "x") for i in range(60)], "test": [Example("t", 0, "x")]}
    assert len(build_data(load_spec("cb"), rows, shots=16).train) == 3 * 8
