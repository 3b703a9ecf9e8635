"""Where rows come from: each kind of file with what real files do wrong, folders, the hub, and real rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tasks.errors import TaskError
from tasks.rows import read_rows
from tasks.sources import load_task
from tasks.spec import Example
from tasks.splits import TaskData

REAL = Path(__file__).parents[2] / "shared" / "data"
SST2 = "sentence\tlabel\n"


def write(path: Path, content: str | bytes) -> Path:
    """A file with exactly these bytes; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def places(path: Path) -> list[str]:
    """Where the rows are, less the folder."""
    return [where.replace(str(path), path.name) for where, _ in read_rows(path)]


def refusal(path: Path) -> str:
    """What the reader says of a file that it refuses, less the folder."""
    with pytest.raises(TaskError) as caught:
        values(path)
    return str(caught.value).replace(str(path), path.name)


def sst2_folder(folder: Path, train: int = 4, test: int = 2) -> Path:
    """A folder for sst2 with so many rows of each label."""
    for split, count in (("train", train), ("test", test)):
        rows = [f"{split} {label} {i}\t{label}\n" for label in (0, 1) for i in range(count)]
        write(folder / f"{split}.tsv", SST2 + "".join(rows))
    return folder


def complaint(name: str, data: Path | str, **options: Any) -> str:
    """What `load_task` says when it refuses."""
    with pytest.raises(TaskError) as caught:
        load_task(name, str(data), **options)
    return str(caught.value)


# -- jsonl -------------------------------------------------------------------------------------------------------

# The same two rows, written in the ways that files come in.
JSONL = [
    '{"s": "a"}\n{"s": "é\u2028b"}\n',
    '{"s": "a"}\n{"s": "é\u2028b"}',  # no newline at the end
    '\ufeff{"s": "a"}\n{"s": "é\u2028b"}\n',  # a byte order mark
    '{"s": "a"}\r\n{"s": "é\u2028b"}\r\n',
    '\n{"s": "a"}\n\n  \n{"s": "\\u00e9\\u2028b"}\n\n',  # empty lines; escapes
]


@pytest.mark.parametrize("text", JSONL)
def test_jsonl_rows_are_read_whatever_the_line_ends(text: str, tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.jsonl", text)) == [{"s": "a"}, {"s": "é\u2028b"}]


def test_jsonl_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"s": "a"}\n\n{"s": "b"}\n')
    assert places(path) == ["a.jsonl:2", "a.jsonl:4"]


def test_a_broken_json_line_is_named(tmp_path: Path) -> None:
    # The value is missing in column 7.
    message = refusal(write(tmp_path / "a.jsonl", '{"s": "a"}\n\n{"s": }\n'))
    assert message == "a.jsonl:3: not JSON: Expecting value at column 7"


@pytest.mark.parametrize(("text", "kind"), [('["a", 1]', "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_json_line_that_is_no_object_is_named(text: str, kind: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", '{"s": "a"}\n' + text))
    assert message == f"a.jsonl:2: expected an object, found {kind}"


def test_half_a_character_in_json_is_refused(tmp_path: Path) -> None:
    # A lone surrogate is no text: no tokenizer takes it, and no log can be written of it.
    sst2_folder(tmp_path)
    path = write(tmp_path / "test.jsonl", '{"sentence": "a \\ud800", "label": 0}\n')
    (tmp_path / "test.tsv").unlink()
    assert complaint("sst2", tmp_path, shots=1).startswith(f"{path}:1: ")


# What Python's own JSON reader does not refuse by its own error.
@pytest.mark.parametrize(
    ("value", "reason"),
    [("[" * 100_000, "values are nested too deeply"), ("9" * 5000, "a number has too many digits")],
)
def test_json_that_cannot_be_read_is_named(value: str, reason: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.jsonl", f'{{"s": "a"}}\n{{"s": {value}}}\n')) == f"a.jsonl:2: {reason}"
    assert refusal(write(tmp_path / "a.json", f'[{{"s": {value}}}]')) == f"a.json:1: {reason}"


# -- tsv ---------------------------------------------------------------------------------------------------------

TSV = [
    's\tn\na "b\t1\n"c" \'d\t2\n',  # stray quotes stay what they are
    's\tn\na "b\t1\n"c" \'d\t2',
    '\ufeffs\tn\na "b\t1\n"c" \'d\t2\n',
    's\tn\r\na "b\t1\r\n"c" \'d\t2\r\n',
]


@pytest.mark.parametrize("text", TSV)
def test_tsv_rows_are_read_whatever_the_quotes_and_line_ends(text: str, tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.tsv", text)) == [{"s": 'a "b', "n": "1"}, {"s": '"c" \'d', "n": "2"}]


def test_tsv_rows_are_numbered_by_line(tmp_path: Path) -> None:
    assert places(write(tmp_path / "a.tsv", "s\tn\na\t1\nb\t2\n")) == ["a.tsv:2", "a.tsv:3"]


def test_the_last_field_of_a_ragged_tsv_row_is_the_last_column(tmp_path: Path) -> None:
    # SNLI's k-shot files: further annotators' labels stand before the gold label.
    path = write(tmp_path / "a.tsv", "s\tlabel1\tgold_label\na\tx\tneutral\nb\tx\ty\tz\tentailment\n")
    assert [row["gold_label"] for row in values(path)] == ["neutral", "entailment"]


def test_the_first_fields_of_a_ragged_tsv_row_are_the_first_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "s\tlabel1\tgold_label\nb\tx\ty\tz\tentailment\n")
    assert [values(path)[0][column] for column in ("s", "label1")] == ["b", "x"]


def test_a_tsv_row_with_too_few_fields_is_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.tsv", "s\tt\tn\na\tb\t1\na\t1\n"))
    assert message == "a.tsv:3: 2 fields; the header has 3 columns"


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_long_cell_is_read_whole(suffix: str, tmp_path: Path) -> None:
    # Python's csv module takes cells of up to 131072 characters, unless it is told otherwise.
    path = write(tmp_path / f"a.{suffix}", "s\n" + "b" * 140_000 + "\n")
    assert values(path) == [{"s": "b" * 140_000}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_empty_lines_of_a_table_are_no_rows(suffix: str, end: str, tmp_path: Path) -> None:
    separator = {"tsv": "\t", "csv": ","}[suffix]
    text = end.join(["s,n", "a,1", "", "b,2", "", ""]).replace(",", separator)
    path = write(tmp_path / f"a.{suffix}", text)
    assert values(path) == [{"s": "a", "n": "1"}, {"s": "b", "n": "2"}]
    assert places(path) == [f"a.{suffix}:2", f"a.{suffix}:4"]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_two_columns_of_one_name_are_refused(suffix: str, tmp_path: Path) -> None:
    # The last one would win without a word.
    text = "s,label,label\na,1,0\n".replace(",", {"tsv": "\t", "csv": ","}[suffix])
    assert refusal(write(tmp_path / f"a.{suffix}", text)) == f"a.{suffix}:1: 'label' is the name of two columns"


def test_a_tsv_file_whose_header_is_an_empty_line_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.tsv", "\ns\tn\na\t1\n")).startswith("a.tsv:")


# -- csv ---------------------------------------------------------------------------------------------------------

CSV = [
    's,n\n"a, ""b""",1\nc,2\n',
    's,n\n"a, ""b""",1\nc,2',
    '\ufeffs,n\n"a, ""b""",1\nc,2\n',
    's,n\r\n"a, ""b""",1\r\nc,2\r\n',
]


@pytest.mark.parametrize("text", CSV)
def test_csv_rows_are_read_with_their_quotes_whatever_the_line_ends(text: str, tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.csv", text)) == [{"s": 'a, "b"', "n": "1"}, {"s": "c", "n": "2"}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_csv_cell_keeps_its_line_breaks(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f's,n{end}"first{end}second",1{end}')
    assert values(path) == [{"s": f"first{end}second", "n": "1"}]


def test_csv_rows_are_numbered_by_their_last_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 's,n\n"one\ntwo",1\nb,2\n')
    assert places(path) == ["a.csv:3", "a.csv:4"]


@pytest.mark.parametrize(("row", "found"), [("a", 1), ("a,1,2", 3)])
def test_a_csv_row_with_another_number_of_fields_is_named(row: str, found: int, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", f"s,n\na,1\n{row}\n"))
    assert message == f"a.csv:3: {found} fields; the header has 2 columns"


@pytest.mark.parametrize("text", ['s,n\n"a,1\n', 's,n\n"a"b,1\n'], ids=["unclosed quote", "text after a quote"])
def test_csv_with_unbalanced_quotes_is_named(text: str, tmp_path: Path) -> None:
    assert re.match(r"a\.csv:2: not CSV: ", refusal(write(tmp_path / "a.csv", text)))


# -- parquet -----------------------------------------------------------------------------------------------------


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    rows = [{"s": "é\n", "n": 1, "x": None}, {"s": "b", "n": 0, "x": 0.5}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"s": ["a", "b"]}), tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet") == ["a.parquet:1", "a.parquet:2"]


@pytest.mark.parametrize("content", [b"", b"s,n\na,1\n", b"PAR1 and no more PAR1"])
def test_a_file_that_is_no_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.parquet", content)).startswith("a.parquet: not a readable parquet file: ")


@pytest.mark.parametrize("place", range(0, 900, 9))
def test_a_damaged_parquet_file_is_read_or_refused(place: int, tmp_path: Path) -> None:
    rows = [{"s": f"text {i}", "n": i, "scores": {"a": 0.5}, "many": ["x"]} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[place % len(content)] ^= 255
    path = write(tmp_path / "a.parquet", bytes(content))
    try:
        values(path)
    except TaskError as error:
        assert str(error).startswith(f"{path}: ")


# -- any file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.tsv", ""), ("a.tsv", "s\tn\n"), ("a.csv", ""), ("a.csv", "s,n\n")],
)
def test_a_file_without_rows_is_refused(name: str, content: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / name, content)) == f"{name}: the file has no rows"


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"s": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == "a.parquet: the file has no rows"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a", "a.xlsx"])
def test_another_kind_of_file_is_refused(name: str, tmp_path: Path) -> None:
    expected = f"{name}: unknown kind of file; expected .jsonl, .json, .tsv, .csv, .parquet"
    assert refusal(write(tmp_path / name, "s,n\na,1\n")) == expected


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.CSV", "s\na\n")) == [{"s": "a"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "csv", "parquet"])
def test_a_file_that_cannot_be_opened_is_named(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").mkdir()
    assert refusal(tmp_path / f"a.{suffix}").startswith(f"a.{suffix}: ")


# (file, header, a good row); and how many good rows come first: files are read in blocks of some thousand bytes.
TEXTS = [("a.jsonl", "", '{"s": "abc"}\n'), ("a.tsv", "s\tn\n", "a\t1\n"), ("a.csv", "s\n", "a\n")]


@pytest.mark.parametrize("rows", [1, 5000])
@pytest.mark.parametrize(("name", "header", "row"), TEXTS)
def test_a_file_that_is_not_utf8_names_the_byte(name: str, header: str, row: str, rows: int, tmp_path: Path) -> None:
    good = (header + row * rows).encode()
    path = write(tmp_path / name, good + b"\xe9" + row.encode())  # Latin-1's é, which begins no UTF-8 sequence here
    assert refusal(path) == f"{name}: not UTF-8 at byte {len(good)}"


# -- folders -----------------------------------------------------------------------------------------------------


def texts(data: TaskData, split: str) -> set[str]:
    return {example.input for example in getattr(data, split)}


def test_a_folder_of_files_becomes_the_splits_of_a_task(tmp_path: Path) -> None:
    data = load_task("sst2", str(sst2_folder(tmp_path)), shots=2)
    drawn = texts(data, "train") | texts(data, "validation")
    assert (drawn, texts(data, "test")) == (
        {f"train {label} {i}" for label in (0, 1) for i in range(4)},
        {f"test {label} {i}" for label in (0, 1) for i in range(2)},
    )


def test_a_folder_may_hold_a_folder_of_the_tasks_name(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "of another task\n")
    sst2_folder(tmp_path / "sst2")
    assert len(load_task("sst2", str(tmp_path), shots=2).test) == 4


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of rows in the format that its name says; no value needs quotes."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        write(path, "\n".join(map(json.dumps, rows)))
    else:
        separator = {".tsv": "\t", ".csv": ","}[path.suffix]
        write(path, "\n".join(separator.join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_task(suffix: str, tmp_path: Path) -> None:
    for kind in ("tsv", suffix):
        for split in ("train", "test"):
            rows = [{"sentence": f"{split} {label} {i}", "label": label} for label in (0, 1) for i in range(4)]
            write_rows(tmp_path / kind / f"{split}.{kind}", rows)
    tsv, other = (load_task("sst2", str(tmp_path / kind), shots=2) for kind in ("tsv", suffix))
    assert tsv == other


@pytest.mark.parametrize("stem", ["validation", "valid", "val", "dev", "validation_matched", "dev_matched"])
def test_validation_has_its_own_file_under_any_usual_name(stem: str, tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    write(tmp_path / f"{stem}.tsv", f"{SST2}own 0\t0\nown 1\t1\n")
    assert texts(load_task("sst2", str(tmp_path), shots=1), "validation") == {"own 0", "own 1"}


def test_the_least_deeply_nested_file_is_taken(tmp_path: Path) -> None:
    sst2_folder(tmp_path / "sst2")
    write(tmp_path / "sst2" / "a" / "test.tsv", f"{SST2}nested\t0\n")
    assert "nested" not in texts(load_task("sst2", str(tmp_path), shots=1), "test")


@pytest.mark.parametrize("data", [".", "sst2"])
def test_of_equally_nested_files_the_first_by_name_is_taken(data: str, tmp_path: Path) -> None:
    for seed in ("16-21", "16-100", "16-13"):
        rows = f"{seed} a\t0\n{seed} b\t1\n{seed} c\t0\n{seed} d\t1\n"
        write(tmp_path / "sst2" / "16-shot" / seed / "train.tsv", f"{SST2}{rows}")
    write(tmp_path / "sst2" / "test.tsv", f"{SST2}t\t0\n")
    train = texts(load_task("sst2", str(tmp_path / data), shots=1), "train")
    assert {text.split()[0] for text in train} == {"16-100"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_lies_further_down_in_a_folder_of_another_name_does_not_count(split: str, tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / f"{split}.tsv").rename(tmp_path / "sub" / f"{split}.tsv")
    message = complaint("sst2", tmp_path, shots=1)
    assert message.startswith(f"sst2: no {split} file in ")
    assert message.endswith("; what lies further down counts only in a folder of the name 'sst2'")


def own_spec(folder: Path, **changes: Any) -> str:
    """A spec of one's own, that names one file of rows, beside the file; its path."""
    spec = yaml.safe_load((Path(__file__).parents[1] / "tasks" / "specs" / "sst2.yaml").read_text(encoding="utf-8"))
    spec |= {"name": "reviews", "files": {"train": ["reviews.jsonl"]}} | changes
    rows = [{"sentence": f"own {label} {i}", "label": label} for label in (0, 1) for i in range(4)]
    write(folder / "reviews.jsonl", "\n".join(map(json.dumps, rows)))
    return str(write(folder / "reviews.yaml", yaml.safe_dump(spec)))


@pytest.mark.parametrize("folder", ["my", "reviews"])
@pytest.mark.parametrize("stem", ["test", "validation"])
def test_a_foreign_file_below_a_task_of_ones_own_is_no_split_of_it(folder: str, stem: str, tmp_path: Path) -> None:
    name = own_spec(tmp_path / folder)
    write(tmp_path / folder / "sub" / f"{stem}.tsv", f"{SST2}foreign 0\t0\nforeign 1\t1\n")
    data = load_task(name, str(tmp_path / folder), shots=1)
    assert {text.split()[0] for split in ("validation", "test") for text in texts(data, split)} == {"own"}


def test_a_folder_of_the_tasks_name_without_its_rows_is_passed_over(tmp_path: Path) -> None:
    name = own_spec(tmp_path)
    write(tmp_path / "reviews" / "notes.txt", "of something else")
    assert len(load_task(name, str(tmp_path), shots=1).train) == 2


def test_a_validation_file_that_the_spec_names_and_that_is_not_there_is_missed(tmp_path: Path) -> None:
    # Else the split would be cut from train, without a word.
    name = own_spec(tmp_path, files={"train": ["reviews.jsonl"], "validation": ["held_out.jsonl"]})
    assert complaint(name, tmp_path).startswith("reviews: no validation file in ")


def test_a_file_of_which_no_row_is_left_is_refused(tmp_path: Path) -> None:
    header = "premise\thypothesis\tgold_label\n"
    write(tmp_path / "train.tsv", header + "".join(f"p\th{i}\t{i % 3}\n" for i in range(6)))
    path = write(tmp_path / "test.tsv", header + "p\tq\t-\n")
    assert complaint("snli", tmp_path, shots=1) == f"{path}: no row is left; all have one of the labels -1, -"


def test_a_path_that_no_system_takes_is_refused(tmp_path: Path) -> None:
    name = own_spec(tmp_path, files={"train": ["a" * 300]})
    assert "File name too long" in complaint(name, tmp_path)
    assert "no data folder" in complaint("sst2", "\0")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"caf\xe9", "not UTF-8 at byte 3"), (b"\xef\xbb\xbfSay yes.", "")],
    ids=["Latin-1", "byte order mark"],
)
def test_a_manual_prompt_file_is_read_or_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = write(sst2_folder(tmp_path) / "manual_prompt.txt", content)
    if reason:
        assert complaint("sst2", tmp_path, shots=1) == f"{path}: {reason}"
    else:
        assert load_task("sst2", str(tmp_path), shots=1).spec.manual_prompt == "Say yes."


@pytest.mark.parametrize("content", ["[]", "{}", '{"annotations": []}', '{"annotations": [3]}', '{"annotations": "x"}'])
def test_annotations_that_are_none_are_refused(content: str, tmp_path: Path) -> None:
    name = own_spec(tmp_path, files={"train": ["reviews.jsonl"], "manual": ["notes.json"]})
    path = write(tmp_path / "notes.json", content)
    assert complaint(name, tmp_path, shots=1) == f"{path}: expected a list of instructions under 'annotations'"


def test_a_file_that_the_spec_names_goes_before_the_usual_ones(tmp_path: Path) -> None:
    sst2_folder(tmp_path)  # its labels 0 and 1 are NLI's too, its one column is not
    write(tmp_path / "train.tsv", "premise\thypothesis\tlabel\n" + "".join(f"p\th{i}\t{i % 3}\n" for i in range(6)))
    write(tmp_path / "dev_generative-nli.jsonl", '{"premise": "P", "hypothesis": "H", "label": "neutral"}\n')
    assert texts(load_task("mnli", str(tmp_path), shots=1), "test") == {"premise : P\nhypothesis : H"}


def test_a_missing_folder_is_named_with_what_else_there_is(tmp_path: Path) -> None:
    expected = f"no data folder {str(tmp_path / 'none')!r}; expected a folder, 'lab' or 'hub'"
    assert complaint("sst2", tmp_path / "none") == expected


@pytest.mark.parametrize(
    ("name", "split", "looked_for"),
    [
        ("sst2", "test", "test.jsonl (or .json, .tsv, .csv, .parquet)"),
        ("sst2", "train", "train.jsonl (or .json, .tsv, .csv, .parquet)"),
        ("mnli", "test", "dev_generative-nli.jsonl, test.jsonl (or .json, .tsv, .csv, .parquet)"),
    ],
)
def test_a_missing_file_names_folder_and_what_was_looked_for(
    name: str, split: str, looked_for: str, tmp_path: Path
) -> None:
    (sst2_folder(tmp_path) / f"{split}.tsv").unlink()
    expected = f"{name}: no {split} file in {str(tmp_path)!r}; looked for {looked_for}"
    assert complaint(name, tmp_path) == expected


def test_a_missing_column_names_file_row_and_columns(tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    path = write(tmp_path / "train.tsv", "text\tlabel\na\t0\n")
    assert complaint("sst2", tmp_path) == f"{path}:2: no column 'sentence'; the columns are text, label"


def test_an_unknown_label_names_file_row_and_what_is_allowed(tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    path = write(tmp_path / "test.tsv", f"{SST2}a\t0\nb\tgood\n")
    expected = f"{path}:3: label 'good' is not in the verbalizer; expected one of negative, positive, or its index"
    assert complaint("sst2", tmp_path) == expected


def test_an_empty_text_names_file_and_row(tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    path = write(tmp_path / "test.tsv", f"{SST2} \t0\n")
    assert complaint("sst2", tmp_path) == f"{path}:2: field 'sentence' is ' '; expected some text"


def test_declared_void_rows_are_left_out(tmp_path: Path) -> None:
    header = "premise\thypothesis\tgold_label\n"
    write(tmp_path / "train.tsv", header + "".join(f"p\th{i}\t{i % 3}\n" for i in range(6)))
    write(tmp_path / "test.tsv", header + "p\tq\t-\np\tr\tneutral\n")
    assert texts(load_task("snli", str(tmp_path), shots=1), "test") == {"premise : p\nhypothesis : r"}


def test_a_folders_manual_prompt_replaces_the_specs(tmp_path: Path) -> None:
    write(sst2_folder(tmp_path) / "manual_prompt.txt", "\nSay yes to gööd films.\n")
    assert load_task("sst2", str(tmp_path), shots=1).spec.manual_prompt == "Say yes to gööd films."


def test_the_specs_manual_prompt_stands_where_the_folder_has_none(tmp_path: Path) -> None:
    spec = load_task("sst2", str(sst2_folder(tmp_path)), shots=1).spec
    assert spec.manual_prompt.startswith("In this task, you are given sentences from movie reviews.")


@pytest.mark.parametrize(("options", "sizes"), [({"shots": 1}, (2, 2, 4)), ({"shots": 2, "test_limit": 3}, (4, 4, 3))])
def test_shots_and_test_limit_reach_the_splits(
    options: dict[str, int], sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    data = load_task("sst2", str(sst2_folder(tmp_path)), **options)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes


def test_too_few_rows_name_where_they_come_from(tmp_path: Path) -> None:
    expected = f"{tmp_path}: sst2: 4 examples left with label 'no' for train; 16 shots need 16"
    assert complaint("sst2", sst2_folder(tmp_path)) == expected


def test_the_seed_reaches_the_splits(tmp_path: Path) -> None:
    folder = str(sst2_folder(tmp_path, train=40))
    one, other = (load_task("sst2", folder, shots=4, seed=seed) for seed in (0, 1))
    assert texts(one, "train") != texts(other, "train")


# -- the hub -----------------------------------------------------------------------------------------------------

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def rows_of(split: str, count: int) -> datasets.Dataset:
    labels = [0, 1] * count
    return datasets.Dataset.from_dict({"sentence": [f"{split} {i}" for i in range(2 * count)], "label": labels})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A hub where every split has four rows of each label, with integer labels; the list of what it is asked."""
    calls: Calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return rows_of(options["split"], 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def hub_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_args: Any, **_options: Any) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def hub_spec(folder: Path, hub: dict[str, str]) -> str:
    """A user's spec with this hub entry; its path."""
    spec = {
        "name": "mood",
        "description": "Is it happy?",
        "fields": {"sentence": []},
        "label": ["label"],
        "verbalizer": {"sad": "no", "happy": "yes"},
        "input": "{sentence}",
        "manual_prompt": "Is it happy?",
        "hub": hub,
    }
    return str(write(folder / "mood.yaml", yaml.safe_dump(spec, sort_keys=False)))


def test_the_hub_is_asked_for_each_split_under_its_own_name(hub: Calls) -> None:
    load_task("sst2", "hub", shots=1)
    glue = ("nyu-mll/glue", "sst2")
    assert hub == [(glue, {"split": "train", "revision": None}), (glue, {"split": "validation", "revision": None})]


def test_the_hubs_rows_become_examples(hub: Calls) -> None:
    data = load_task("sst2", "hub", shots=1)  # its test split is the hub's validation split
    assert data.test[:2] == (Example("validation 0", 0, "no"), Example("validation 1", 1, "yes"))


def test_a_revision_and_a_validation_split_are_passed_on(hub: Calls, tmp_path: Path) -> None:
    entry = {"path": "me/mood", "train": "a", "validation": "b", "test": "c", "revision": "v2"}
    load_task(hub_spec(tmp_path, entry), "hub", shots=1)
    assert hub == [(("me/mood", None), {"split": split, "revision": "v2"}) for split in ("a", "b", "c")]


def test_a_large_training_split_is_sampled_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first 5500 rows have label 0 and the last 500 label 1: the first 5000 would hold none of these.
    large = datasets.Dataset.from_dict({"sentence": [f"s {i}" for i in range(6000)], "label": [0] * 5500 + [1] * 500})
    splits = {"train": large, "validation": rows_of("validation", 2)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, split, **_options: splits[split])
    data = load_task("sst2", "hub", shots=16)
    assert Counter(example.label for example in data.train) == {0: 16, 1: 16}


# No network, no such data set, data set of scripts: what `datasets` 5 raises for each.
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (LocalEntryNotFoundError)"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'nyu-mll/glue' doesn't exist on the Hub"),
        ValueError("Unknown split 'x'. Should be one of ['train', 'test']."),
        RuntimeError("Dataset scripts are no longer supported, but found glue.py"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_fails_is_one_clear_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_fails(monkeypatch, error)
    expected = (
        f"sst2: cannot load 'nyu-mll/glue' from the hub ({error}); without a network put train and test files "
        "(.jsonl, .json, .tsv, .csv, .parquet) into a folder and use data=DIR, or data=lab"
    )
    assert complaint("sst2", "hub") == expected


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError("first\nsecond"), "(first)"), (ConnectionError(), "(ConnectionError)")]
)
def test_the_hubs_reason_is_cut_to_one_line_and_never_empty(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_fails(monkeypatch, error)
    message = complaint("sst2", "hub")
    assert reason in message and "\n" not in message


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([], "the split has no rows"), ([-1, -1], "no row is left; all have one of the labels -1, -")],
)
def test_a_split_of_the_hub_without_rows_is_not_cut_from_another(
    labels: list[int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_args: Any, split: str, **_options: Any) -> datasets.Dataset:
        found = labels if split == "test" else [0, 1, 2] * 4
        texts = [f"{split} {i}" for i in range(len(found))]
        return datasets.Dataset.from_dict({"premise": texts, "hypothesis": texts, "label": found})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert complaint("snli", "hub", shots=1) == f"stanfordnlp/snli[test]: {reason}"


def test_a_task_without_a_hub_data_set_says_so(tmp_path: Path) -> None:
    assert complaint(hub_spec(tmp_path, {}), "hub") == "mood: the task has no hub data set; use data=DIR"


@pytest.mark.parametrize("missing", ["path", "train"])
def test_a_hub_entry_without_path_train_or_test_names_what_is_missing(missing: str, hub: Calls, tmp_path: Path) -> None:
    entry = {"path": "me/mood", "train": "train", "test": "test"}
    del entry[missing]
    assert missing in complaint(hub_spec(tmp_path, entry), "hub", shots=1)


def test_a_bad_row_of_the_hub_is_named_by_data_set_split_and_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, -1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: rows)
    assert complaint("sst2", "hub").startswith("nyu-mll/glue/sst2[train]:1: label -1 is not in the verbalizer")


# -- real rows ---------------------------------------------------------------------------------------------------

# Rows of the public test files, from shared/data/SOURCES.md.
REAL_ROWS = {"sst2": 872, "mrpc": 408, "rte": 277, "qnli": 5463, "mnli": 9815}
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real rows in {REAL}")


@pytest.fixture(scope="module")
def real() -> Callable[[str], TaskData]:
    """Loads each real task once."""
    loaded: dict[str, TaskData] = {}

    def load(name: str) -> TaskData:
        return loaded.setdefault(name, loaded.get(name) or load_task(name, str(REAL)))

    return load


@needs_real_rows
@pytest.mark.parametrize(("name", "count"), REAL_ROWS.items())
def test_real_test_splits_have_all_their_rows(name: str, count: int, real: Callable[[str], TaskData]) -> None:
    assert len(real(name).test) == count


@needs_real_rows
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_small_splits_are_balanced(name: str, split: str, real: Callable[[str], TaskData]) -> None:
    data = real(name)
    examples: Sequence[Any] = getattr(data, split)
    assert Counter(e.answer for e in examples) == dict.fromkeys(data.spec.words, 16)


# Test labels by word, from SOURCES.md: sst2 444 positive, mrpc 279 equivalent, rte 146 and qnli 2702 entailed.
@needs_real_rows
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst2", {"yes": 444, "no": 872 - 444}),
        ("mrpc", {"yes": 279, "no": 408 - 279}),
        ("rte", {"yes": 146, "no": 277 - 146}),
        ("qnli", {"yes": 2702, "no": 5463 - 2702}),
        ("mnli", {"yes": 3479, "maybe": 3123, "no": 3213}),
    ],
)
def test_real_test_labels_are_read_the_right_way_round(
    name: str, expected: dict[str, int], real: Callable[[str], TaskData]
) -> None:
    assert Counter(example.answer for example in real(name).test) == expected
