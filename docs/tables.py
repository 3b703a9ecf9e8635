"""Makes the tables and heat maps of the docs from docs/results, where every run that they show is a line of JSON.

    python docs/tables.py

A page says where a table goes, and which:

    <!-- results: stability: plane of learning rate by reference -->
    <!-- end of results -->

The first word is a file in docs/results; `experiments/diagnostics/tables.py` has the tables. `tests/test_results.py`
compares the committed pages and pictures with what this module makes.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.diagnostics.tables import markdown, view
from experiments.page.heat_map import drawn
from experiments.run.folder import read_jsonl

DOCS = Path(__file__).parent
# File in docs/results, and name of the picture -> what it shows.
PICTURES = dict.fromkeys(("grid", "grid-real"), "test of target by agent")
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- results: ([\w-]+): (.+?) -->\n\n)(.*?)(\n?<!-- end of results -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text of a page with all its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + table(found[2], found[3]) + "\n" + found[5].lstrip("\n"), text)


def table(study: str, words: str) -> str:
    """A table of a study's runs, in Markdown."""
    return markdown(view(read_jsonl(DOCS / "results" / f"{study}.jsonl"), words))


def picture(study: str) -> str | None:
    """The heat map of a study's runs, as an SVG file."""
    return drawn(read_jsonl(DOCS / "results" / f"{study}.jsonl"), PICTURES[study])


def main() -> None:
    """Rewrites the pages whose tables have changed, and the pictures."""
    for study in PICTURES:
        (DOCS / "images" / f"{study}.svg").write_text(picture(study) or "", encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(f"{page.name}: tables made anew")


if __name__ == "__main__":
    main()
