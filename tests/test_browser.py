"""The pages in a real browser: `make test-browser`. Skipped without Chromium or playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.config import build_config
from experiments.diagnostics.results import read_row
from experiments.page.comparison import render_comparison
from experiments.page.run_page import render_report
from experiments.run.run import prepare
from experiments.train import train

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
RUNS = {"fixed": ("mnli", "fixed"), "tte": ("mixed", "tte"), "text": ("antonyms", "fixed")}
PAGES = [*RUNS, "stopped", "comparison"]
SMALL = ["threads=1", "examples.test_limit=30", "headroom=4", "prompts=4", "anchor.period=2", "anchor.prompts=2"]
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """report.html of real runs of four iterations, and of one that was stopped."""
    found = {}
    for name, (task, mode) in RUNS.items():
        folder = tmp_path_factory.mktemp("runs") / name
        options = {"task": task, "mode": mode, "steps": 4, "run": str(folder)}
        train(prepare(build_config(options, assignments=SMALL)), quiet=True)
        found[name] = folder / "report.html"
    stopped = tmp_path_factory.mktemp("runs") / "stopped"
    shutil.copytree(found["fixed"].parent, stopped)
    for name in ("best_prompt.json", "predictions.jsonl", "candidates.jsonl"):
        (stopped / name).unlink()
    (stopped / "report.html").write_text(render_report(stopped, "accuracy"), encoding="utf-8")
    comparison = stopped.parent / "comparison.html"
    comparison.write_text(render_comparison([read_row(found["fixed"].parent), read_row(stopped)]), encoding="utf-8")
    return found | {"stopped": stopped / "report.html", "comparison": comparison}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_sound(name: str, width: int, pages: dict[str, Path], browser: Any) -> None:
    trouble: list[str] = []
    page = opened(browser, pages[name], width, trouble)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert trouble == []
    page.close()
    # axe is a script of its own, which the page's policy would refuse.
    page = opened(browser, pages[name], width, bypass_csp=True)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page, options=RULES)
        assert found.violations_count == 0, f"{scheme}: {found.generate_report()}"
    page.close()


def opened(browser: Any, path: Path, width: int, trouble: list[str] | None = None, **options: Any) -> Any:
    """The page with everything unfolded; `trouble` gets its errors, and what it asks for outside."""
    page, told = (
        browser.new_page(viewport={"width": width, "height": 900}, **options),
        [] if trouble is None else trouble,
    )
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else told.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    return page


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_on_paper(name: str, pages: dict[str, Path], browser: Any) -> None:
    page = browser.new_page(viewport={"width": 720, "height": 1000})  # the width of a sheet of A4
    page.goto(pages[name].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert page.locator("button:visible, input:visible").count() == 0
    page.close()


def test_the_search_box_hides_what_does_not_match(pages: dict[str, Path], browser: Any) -> None:
    page = browser.new_page()
    page.goto(pages["fixed"].as_uri())
    page.locator("details:has(#prompts) > summary").click()
    rows = page.locator("#prompts tbody tr")
    first = rows.first.locator("th").inner_text()
    assert rows.count() > 1
    page.locator("input[type=search]").fill(first.upper())
    assert page.locator("#prompts tbody tr:visible").count() < rows.count()
    assert page.locator("#prompts tbody tr:visible").first.locator("th").inner_text() == first
    page.close()


def test_without_scripts_nothing_is_missing(pages: dict[str, Path], browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["fixed"].as_uri())
    assert page.locator("svg[role=img]").count() >= 6
    assert page.locator("button:visible, input:visible").count() == 0  # what only a script could do is not offered
    context.close()
