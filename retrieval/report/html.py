"""Page frame and tables of every HTML page: self-contained, light and dark, responsive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #1769aa;
  --page: #f5f7fa; --card: #fff; --mark: #d3f0dc; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e7eb; --soft: #a7b1bc; --line: #3b4754; --accent: #6bb1e8;
  --page: #12181f; --card: #1c242d; --mark: #1f5136; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 1.25rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }}
h2 {{ font-size: 1.15rem; margin: 0 0 .5rem; }}
h1, h2, h3, li, p {{ overflow-wrap: anywhere; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1rem; margin: 1rem 0; }}
p {{ margin: .4rem 0; max-width: 46rem; }} .soft {{ color: var(--soft); font-size: .92rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--card); }}
tr.model td {{ font-weight: 600; }} th {{ color: var(--soft); font-weight: 500; }}
.figures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }}
.figures section {{ margin: 0; min-width: 0; }}
svg {{ width: 100%; max-width: 34rem; height: auto; display: block; background: #fff; border-radius: .3rem; }}
mark {{ color: inherit; background: var(--mark); padding: 0 .2em; border-radius: .2em; }}
.verdict {{ border-left: .35rem solid var(--accent); }} .verdict p:first-of-type {{ font-size: 1.15rem; }}
.tall {{ max-height: 32rem; overflow-y: auto; }} :focus-visible {{ outline: 3px solid var(--accent); }}
#examples td {{ white-space: normal; text-align: left; vertical-align: top; min-width: 7rem; }}
#examples th {{ text-align: left; }}
#examples td:first-child {{ min-width: 3rem; overflow-wrap: normal; }}
.controls {{ display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; }}
input, select {{ font: inherit; color: inherit; background: var(--page); border: 1px solid var(--soft);
  border-radius: .3rem; padding: .2rem .4rem; max-width: 100%; }}
.by-metric[data-metric=HR] .NDCG, .by-metric[data-metric=HR] .MRR, .by-metric[data-metric=NDCG] .HR,
.by-metric[data-metric=NDCG] .MRR, .by-metric[data-metric=MRR] .HR,
.by-metric[data-metric=MRR] .NDCG {{ display: none; }}
@media (max-width: 40rem) {{ main {{ padding: .75rem; }} th, td {{ padding: .3rem .45rem; font-size: .9rem; }}
  td:first-child {{ white-space: normal; overflow-wrap: anywhere; min-width: 7.5rem; max-width: 7.5rem; }} }}
.numbers {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: .8rem 0; }}
.numbers b {{ display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent); }}
</style></head><body><main>{body}</main></body></html>
"""


def number(value: float | None, digits: int = 4) -> str:
    """Format a number for a table; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def labelled_svg(svg: str, label: str) -> str:
    """An SVG document as an image with an accessible name.

    >>> labelled_svg("<svg width=0></svg>", "a < b")
    '<svg role="img" aria-label="a &lt; b" width=0></svg>'
    """
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def html_table(
    header: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]], columns: Sequence[str] = (), label: str = "table"
) -> str:
    """A horizontally scrollable table; rows may be highlighted.

    Args:
        header: names of the columns.
        rows: cells of each row, and whether it is highlighted.
        columns: CSS class of each column; optional.
        label: accessible name of the table.
    """
    classes = [f' class="{name}"' if name else "" for name in columns] or [""] * len(header)
    head = "".join(f'<th scope="col"{c}>{escape(cell)}</th>' for cell, c in zip(header, classes, strict=True))
    lines = "".join(
        f"<tr{' class=model' if mark else ''}>"
        + "".join(f"<td{c}>{escape(cell)}</td>" for cell, c in zip(row, classes, strict=True))
        + "</tr>"
        for row, mark in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'
