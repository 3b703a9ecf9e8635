"""Rows from the hub: the requests to it, and the messages when it fails."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from tasks.sources import load_task
from tasks.spec import Example
from tests.test_sources import complaint, write

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def rows_of(split: str, count: int) -> datasets.Dataset:
    labels = [0, 1] * count
    return datasets.Dataset.from_dict({"sentence": [f"{split} {i}" for i in range(2 * count)], "label": labels})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A hub where every split has four rows of each label, with integer labels; returns the list of calls to it."""
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
    """Writes a user's spec with this hub entry; returns its path."""
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
    # The first 5500 rows have label 0 and the last 500 label 1: the first 5000 would hold no label 1.
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
