"""The docs: what they say about files, lines and names is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = re.findall(r"`([\w/]+\.py):(\d+)`\s+`(\w+)`", (ROOT / "docs" / "house.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "line", "name"), PLACES)
def test_a_name_is_defined_where_the_house_says(file: str, line: str, name: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [n for n, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
    assert int(line) in found, f"{file}: {name} is at {found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_tree_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:appo|rewards|tasks|experiments|tests|examples)/[\w/.]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name
