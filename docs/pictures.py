"""Makes the pictures of the README and the docs from a run's folder.

    appo train --task mnli --run runs/mnli
    python docs/pictures.py runs/mnli

Writes docs/images/curve.svg and, with the extra [browser] and Chromium, docs/images/report.png.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from experiments.page.html import STYLE
from experiments.page.run_page import render_report
from experiments.run.files import write_whole

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1100, 1180  # of the report's upper part, in pixels


def curve(page: str) -> str:
    """The chart of the scores as a file of its own, with the colours of the light page."""
    figure = page.split("<figcaption>Score")[1].split("</figure>", maxsplit=1)[0]
    chart = figure[figure.rindex("<svg viewBox") :]
    colours = dict(re.findall(r"(--\w+): (#\w+)", STYLE.split("@media")[0]))
    rules = " ".join(re.findall(r"svg [^}]*}", STYLE.split("@media print")[0]))
    style = re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], rules).replace("svg ", "")
    font = "text { font: 12px system-ui, sans-serif; }"
    sheet = f'<rect width="100%" height="100%" fill="#fff"/><style>{style} {font}</style>'
    opened = chart.index(">") + 1
    return chart[:4] + ' xmlns="http://www.w3.org/2000/svg"' + chart[4:opened] + sheet + chart[opened:] + "\n"


def main() -> int:
    """Draws both; returns the exit code."""
    folder = Path(sys.argv[1])
    page = render_report(folder, "accuracy")
    IMAGES.mkdir(exist_ok=True)
    write_whole(IMAGES / "curve.svg", curve(page))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no report.png: it needs Chromium and pip install '.[browser]'", file=sys.stderr)
        return 1
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        shown.goto((folder / "report.html").absolute().as_uri())
        shown.screenshot(path=IMAGES / "report.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
