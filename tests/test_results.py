"""The tables of the docs hold what docs/results does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import tables  # noqa: E402 - docs/ is no package

from experiments.run.folder import read_jsonl  # noqa: E402


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_made_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `make results`"


@pytest.mark.parametrize("study", tables.PICTURES)
def test_pictures_are_made_of_the_results(study: str) -> None:
    shipped = (ROOT / "docs" / "images" / f"{study}.svg").read_text(encoding="utf-8")
    assert shipped == tables.picture(study), "run `make results`"


@pytest.mark.parametrize("file", sorted((ROOT / "docs/results").glob("*.jsonl")), ids=lambda file: file.stem)
def test_every_run_says_what_it_was(file: Path) -> None:
    for record in read_jsonl(file):
        assert record["study"] == file.stem
        assert len(record["curve"]) == record["iterations"]
        assert record["commit"] and record["environment"]["torch"] and record["config"]["arm"]
        assert record["test_score"] is None or record["test_interval"][0] <= record["test_score"]


def test_every_file_of_results_is_shown_somewhere() -> None:
    shown = {study for page in tables.PAGES for _, study, *_ in tables.BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert {file.stem for file in (ROOT / "docs/results").glob("*.jsonl")} == shown
