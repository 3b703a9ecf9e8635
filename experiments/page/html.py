"""The frame of every page: one file that opens offline, in light and dark, on a phone and on paper.

A model wrote the prompts, so all text is escaped, and the page's policy forbids outside content and all scripts except
its own, which copies a prompt and filters a table. The page is complete without scripts.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #4d565f; --paper: #fff; --wash: #f1f4f7; --rule: #c3cad1;
  --one: #1f5fa8; --two: #a04a00; --three: #6b3fa0; --four: #00695c;
  --good: #1c6b3c; --bad: #a8281c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #b1bac3; --paper: #15181b; --wash: #22272c;
  --rule: #48515a; --one: #7db4f2; --two: #f0a45d; --three: #c3a1f0; --four: #5fc9b8;
  --good: #74cf98; --bad: #f5917f; } }
* { box-sizing: border-box; }
body { font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .5rem 0; } a { color: var(--one); }
.muted, caption { color: var(--soft); } .verdict { font-size: 1.15rem; font-weight: 600; }
.verdict.better { color: var(--good); } .verdict.worse { color: var(--bad); }
.warning { border-left: 4px solid var(--bad); padding: .3rem .8rem; background: var(--wash); }
.prompt { display: flex; gap: .8rem; align-items: flex-start; background: var(--wash); padding: .7rem 1rem;
  border-left: 4px solid var(--one); margin: .5rem 0; }
.prompt q { flex: 1; quotes: none; white-space: pre-wrap; user-select: all; }
button, input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--soft);
  border-radius: 4px; padding: .25rem .7rem; }
:focus-visible { outline: 3px solid var(--one); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
caption { text-align: left; padding: .2rem 0; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tbody th { font-weight: normal; } tbody th, td.long { min-width: 12rem; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.matrix td { text-align: right; background: color-mix(in srgb, var(--one) calc(var(--share) * 35%), transparent); }
pre { background: var(--wash); padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
details > summary { cursor: pointer; padding: .3rem 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; max-width: 46rem; break-inside: avoid; } figcaption { font-weight: 600; }
figure > svg { width: 100%; height: auto; font-size: 12px; } svg text { fill: var(--soft); }
.legend { font-size: .9rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .2rem 0; }
.swatch { width: 1.7rem; height: .75rem; vertical-align: -.05rem; margin-right: .3rem; }
svg .grid { stroke: var(--rule); stroke-width: .7; } svg .line { fill: none; stroke-width: 2; }
svg .one { stroke: var(--one); } svg .two { stroke: var(--two); } svg .faint { stroke-width: 1; opacity: .45; }
svg .three { stroke: var(--three); } svg .four { stroke: var(--four); }
svg .line.two { stroke-dasharray: 6 3; } svg .line.three { stroke-dasharray: 2 2; }
svg .line.four { stroke-dasharray: 8 2 2 2; } svg .line.again { stroke-dasharray: 14 4; }
svg .line.thrice { stroke-dasharray: 1 5; } svg .band { stroke: none; opacity: .18; }
svg .band.one { fill: var(--one); } svg .band.two { fill: var(--two); } svg .band.three { fill: var(--three); }
svg .band.four { fill: var(--four); } svg .rule { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .dot.one { fill: var(--one); } svg .dot.two { fill: var(--two); }
svg .dot.three { fill: var(--three); } svg .dot.four { fill: var(--four); }
svg .dot { opacity: .75; stroke: none; } svg .mean { stroke-width: 2.5; } svg circle.line { fill: currentColor; }
svg .promote { fill: var(--good); stroke: var(--good); } svg .rollback { fill: var(--bad); stroke: var(--bad); }
svg .mark { stroke-dasharray: 3 3; stroke-width: 1; } svg .mark.rollback { stroke-dasharray: 1 3; }
@media (max-width: 40rem) { .number { white-space: normal; } th, td { padding: .3rem .4rem; }
  tbody th, td.long { min-width: 9rem; } }
@media print { body { max-width: none; font-size: 10pt; } button, .search { display: none; }
  h2, h3 { break-after: avoid; } tr, .prompt, .warning { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td, .number { padding: 2px 5px 2px 0; white-space: normal; }
  tbody th, td.long { min-width: 4.5rem; } }
"""
SCRIPT = """
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.onclick = () => navigator.clipboard.writeText(button.previousElementSibling.textContent)
    .then(() => { button.textContent = "copied"; });
}
for (const box of document.querySelectorAll(".search")) {
  box.hidden = false;
  box.querySelector("input").oninput = (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of document.getElementById(box.dataset.table).tBodies[0].rows)
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
  };
}
"""
LONG = 30  # characters of a cell that gets a wide column
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of these parts, which are HTML; the title is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], name: str = "", texts: int = 1) -> str:
    """A table of text: the first `texts` columns are words, the others numbers.

    Args:
        caption: what the rows are.
        header, rows: plain text, escaped here.
        name: an id, for a search box.
    """

    def cell(tag: str, text: str, column: int) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kind = "number" if column >= texts else "long" if len(text) > LONG else ""
        named = f' class="{kind}"' if kind else ""
        return f"<{tag}{scope}{named}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, i) for i, text in enumerate(header))
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(cell("td", text, i) for i, text in enumerate(others, 1))
        + "</tr>"
        for first, *others in rows
    )
    identity = f' id="{name}"' if name else ""
    return scrolled(
        caption,
        f"<table{identity}><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def scrolled(name: str, content: str) -> str:
    """Wide content that scrolls by itself, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{content}</div>'


def figure(title: str, caption: str, content: str) -> str:
    """A chart, which is HTML, under its title; title and caption are text."""
    named = f'{escape(title)} <span class="muted">{escape(caption)}</span>'
    return f"<figure><figcaption>{named}</figcaption>{content}</figure>"


def prompt(text: str) -> str:
    """A prompt as a block, with a button that copies it."""
    return f'<div class="prompt"><q>{escape(text)}</q><button type="button" data-copy hidden>copy</button></div>'


def search(name: str, what: str) -> str:
    """A box that filters the rows of the table with this id."""
    return (
        f'<p class="search" data-table="{name}" hidden><label>Search {escape(what)}: <input type="search"></label></p>'
    )


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"
