"""Where the rows of a task are found, and checks of real rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tasks.errors import TaskError
from tasks.sources import load_task
from tasks.splits import TaskData

REAL = Path(__file__).parents[2] / "shared" / "data"
SST2 = "sentence\tlabel\n"


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file with exactly these bytes, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sst2_folder(folder: Path, train: int = 4, test: int = 2) -> Path:
    """Writes sst2 files with so many rows of each label into the folder."""
    for split, count in (("train", train), ("test", test)):
        rows = [f"{split} {label} {i}\t{label}\n" for label in (0, 1) for i in range(count)]
        write(folder / f"{split}.tsv", SST2 + "".join(rows))
    return folder


def complaint(name: str, data: Path | str, **options: Any) -> str:
    """What `load_task` says when it refuses."""
    with pytest.raises(TaskError) as caught:
        load_task(name, str(data), **options)
    return str(caught.value)


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
    """Writes rows in the format that the file's name says; no value needs quotes."""
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
def test_files_in_subfolders_of_other_names_do_not_count(split: str, tmp_path: Path) -> None:
    sst2_folder(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / f"{split}.tsv").rename(tmp_path / "sub" / f"{split}.tsv")
    message = complaint("sst2", tmp_path, shots=1)
    assert message.startswith(f"sst2: no {split} file in ")
    assert message.endswith("; files further down count only in a folder named 'sst2'")


def own_spec(folder: Path, **changes: Any) -> str:
    """Writes a spec of one's own beside its one file of rows; returns the spec's path."""
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
    # Otherwise validation would silently be cut from train.
    name = own_spec(tmp_path, files={"train": ["reviews.jsonl"], "validation": ["held_out.jsonl"]})
    assert complaint(name, tmp_path).startswith("reviews: no validation file in ")


def test_a_file_without_usable_rows_is_refused(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((content, "expected a list of instructions under 'annotations'") for content in ("[]", "{}", "3")),
        ('{"annotations": []}', "expected a list of instructions under 'annotations'"),
        ('{"annotations": [{}]}', "field 'annotations' is {}; expected some text"),
        ('{"annotations": ["\\ud800"]}', r"field 'annotations' is '\ud800'; expected some text"),
    ],
)
def test_malformed_annotations_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    name = own_spec(tmp_path, files={"train": ["reviews.jsonl"], "manual": ["notes.json"]})
    path = write(tmp_path / "notes.json", content)
    assert complaint(name, tmp_path, shots=1) == f"{path}: {reason}"


def test_a_file_that_the_spec_names_goes_before_the_usual_ones(tmp_path: Path) -> None:
    sst2_folder(tmp_path)  # its labels 0 and 1 are valid for NLI, its only column is not
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
    expected = f"{tmp_path}: sst2: 4 different examples left with label 'no' for train; 16 shots need 16"
    assert complaint("sst2", sst2_folder(tmp_path)) == expected


def test_the_seed_reaches_the_splits(tmp_path: Path) -> None:
    folder = str(sst2_folder(tmp_path, train=40))
    one, other = (load_task("sst2", folder, shots=4, seed=seed) for seed in (0, 1))
    assert texts(one, "train") != texts(other, "train")


# -- real rows --------------------------------------------------------------------------------------------------------

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
