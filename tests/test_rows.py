"""Files of rows: each format, with the faults of real files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tasks.errors import TaskError
from tasks.rows import read_rows
from tests.test_sources import complaint, sst2_folder, write


def values(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def places(path: Path) -> list[str]:
    """Where each row is, without the folder."""
    return [where.replace(str(path), path.name) for where, _ in read_rows(path)]


def refusal(path: Path) -> str:
    """The error for a file that is refused, without the folder."""
    with pytest.raises(TaskError) as caught:
        values(path)
    return str(caught.value).replace(str(path), path.name)


# -- jsonl ------------------------------------------------------------------------------------------------------------

# The same two rows, written in the ways that real files are.
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


def test_lines_of_json_under_the_name_of_a_single_value_are_told_their_name(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.json", '{"s": "a"}\n{"s": "b"}\n'))
    assert message == (
        "a.json:2: not JSON: Extra data at column 1; a file with an object on each line is called .jsonl"
    )


@pytest.mark.parametrize(("text", "kind"), [('["a", 1]', "list"), ('"a"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_json_line_that_is_no_object_is_named(text: str, kind: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", '{"s": "a"}\n' + text))
    assert message == f"a.jsonl:2: expected an object, found {kind}"


def test_half_a_character_in_json_is_refused(tmp_path: Path) -> None:
    # A lone surrogate is no text: no tokenizer accepts it, and it cannot be written to a log.
    sst2_folder(tmp_path)
    path = write(tmp_path / "test.jsonl", '{"sentence": "a \\ud800", "label": 0}\n')
    (tmp_path / "test.tsv").unlink()
    assert complaint("sst2", tmp_path, shots=1).startswith(f"{path}:1: ")


# Values on which Python's JSON reader fails with an error other than JSONDecodeError.
@pytest.mark.parametrize(
    ("value", "reason"),
    [("[" * 100_000, "values are nested too deeply"), ("9" * 5000, "a number has too many digits")],
)
def test_json_that_cannot_be_read_is_named(value: str, reason: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.jsonl", f'{{"s": "a"}}\n{{"s": {value}}}\n')) == f"a.jsonl:2: {reason}"
    assert refusal(write(tmp_path / "a.json", f'[{{"s": {value}}}]')) == f"a.json:1: {reason}"


# -- tsv --------------------------------------------------------------------------------------------------------------

TSV = [
    's\tn\na "b\t1\n"c" \'d\t2\n',  # stray quotes are kept
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


@pytest.mark.parametrize("header", ["s\tn", "s\tgold_label", "label1\tn"])
def test_only_rows_with_further_labels_may_have_more_fields_than_columns(header: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.tsv", f"{header}\na\t1\ntext\tand this\tgood\n"))
    assert message == "a.tsv:3: 3 fields; the header has 2 columns"


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_long_cell_is_read_whole(suffix: str, tmp_path: Path) -> None:
    # By default Python's csv module refuses cells of more than 131072 characters.
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
    # Otherwise the last one would win silently.
    text = "s,label,label\na,1,0\n".replace(",", {"tsv": "\t", "csv": ","}[suffix])
    assert refusal(write(tmp_path / f"a.{suffix}", text)) == f"a.{suffix}:1: 'label' is the name of two columns"


def test_a_tsv_file_whose_header_is_an_empty_line_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.tsv", "\ns\tn\na\t1\n")).startswith("a.tsv:")


# -- csv --------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("a.csv", "s;n", "'s;n'; expected columns divided by commas"),
        ("a.csv", "s\tn", r"'s\tn'; expected columns divided by commas"),
        ("a.tsv", "s,n", "'s,n'; expected columns divided by tabs"),
    ],
)
def test_a_table_with_another_sign_between_its_columns_is_told_so(
    name: str, header: str, expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, f"{header}\none, two, three\n")
    assert refusal(path) == f"{name}:1: the header is {expected}"


# -- parquet ----------------------------------------------------------------------------------------------------------


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


# -- any file ---------------------------------------------------------------------------------------------------------


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


# (file, header, a good row). Many good rows come first, as files are read in blocks of some thousand bytes.
TEXTS = [("a.jsonl", "", '{"s": "abc"}\n'), ("a.tsv", "s\tn\n", "a\t1\n"), ("a.csv", "s\n", "a\n")]


@pytest.mark.parametrize("rows", [1, 5000])
@pytest.mark.parametrize(("name", "header", "row"), TEXTS)
def test_a_file_that_is_not_utf8_names_the_byte(name: str, header: str, row: str, rows: int, tmp_path: Path) -> None:
    good = (header + row * rows).encode()
    path = write(tmp_path / name, good + b"\xe9" + row.encode())  # é in Latin-1, which is not UTF-8 here
    assert refusal(path) == f"{name}: not UTF-8 at byte {len(good)}"
