"""A hook of mkdocs: files of the repository that pages link to become part of the site.

On GitHub `../appo/anchor.py` is a link to the source. The site has the same file as sources/appo/anchor.py.txt, which
browsers show.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside docs/ that a page links to."""
    texts = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in texts for name in OUTSIDE.findall(text)}):
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"sources/{name}.txt", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points the links to these files."""
    return OUTSIDE.sub(r"](sources/\1.txt)", markdown)
