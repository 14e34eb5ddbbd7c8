"""Example sessions of the report: clicks, recommendations and the next click."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from retrieval.blend.ranker import BLEND
from retrieval.evaluation import Evaluation
from retrieval.rankers.registry import MODEL
from retrieval.titles import Titles

EXAMPLES, LAST_CLICKS, RECOMMENDED = 200, 5, 10


@dataclass(frozen=True)
class Example:
    """A test query.

    Attributes:
        user_id: user of the session.
        clicked: last clicks before the target, oldest first.
        recommended: the best candidates, best first.
        target: the item clicked next.
        rank: rank of the target in `recommended`, from 1; 0 if it is not listed.
    """

    user_id: int
    clicked: list[str]
    recommended: list[str]
    target: str
    rank: int


def examples_of(evaluation: Evaluation, work_folder: Path, titles: Titles) -> list[Example]:
    """Evenly spaced test queries, ranked by the blend if there is one; items by title, else by raw id."""
    blend, out = evaluation.blend(work_folder), []
    for queries in evaluation.bundle.sample_queries("test", EXAMPLES):
        ranker = evaluation.rankers[MODEL]
        _, listed = blend.rank(queries, "test", variants=False)[BLEND] if blend else ranker(queries)
        for row in range(len(queries)):
            seen = queries.seen[queries.seen_offset[row] : queries.seen_offset[row + 1]][-LAST_CLICKS:]
            items, target = listed[row, :RECOMMENDED], int(queries.target[row])
            index = np.flatnonzero(items == target)
            clicked, best, [then] = (
                [titles.get(raw, str(raw)) for raw in evaluation.item_id[ids[ids > 0]].tolist()]
                for ids in (seen, items, np.array([target]))
            )
            rank = int(index[0]) + 1 if len(index) else 0
            out.append(Example(int(queries.user_id[row]), clicked, best, then, rank))
    return out


SCRIPT = """<script>
(() => {
  const text = document.getElementById("find"), kind = document.getElementById("which");
  const rows = [...document.querySelectorAll("#examples tbody tr")], count = document.getElementById("count");
  function show() {
    const wanted = text.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!kind.value || row.dataset.hit === kind.value) && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} sessions`;
  }
  text.addEventListener("input", show); kind.addEventListener("change", show); show();
})();
</script>"""


def examples_section(examples: Sequence[Example]) -> str:
    """A searchable table; empty without examples."""
    if not examples:
        return ""
    rows = "".join(_row(example) for example in examples)
    hits = sum(example.rank > 0 for example in examples)
    return (
        '<section><h2 id="examples-title">Sessions</h2><p class="soft">Last clicks, oldest first → the '
        f"{RECOMMENDED} items ranked first. The item that was clicked next is marked; {hits} of these "
        f"{len(examples)} evenly spread test sessions have it.</p>"
        '<p class="controls"><label>Search <input id="find" type="search" autocomplete="off"></label> '
        '<label>Show <select id="which"><option value="">all</option><option value="1">found</option>'
        '<option value="0">missed</option></select></label> <span id="count" role="status"></span></p>'
        '<div class="scroll tall" tabindex="0" role="region" aria-labelledby="examples-title"><table id="examples">'
        '<thead><tr><th scope="col">user</th><th scope="col">last clicks</th><th scope="col">ranked first</th>'
        f'<th scope="col">clicked next</th></tr></thead><tbody>{rows}</tbody></table></div></section>{SCRIPT}'
    )


def _row(example: Example) -> str:
    listed = [
        f"<mark>{escape(name)}</mark>" if number == example.rank else escape(name)
        for number, name in enumerate(example.recommended, 1)
    ]
    then = escape(example.target) + (f" (rank {example.rank})" if example.rank else " (not listed)")
    cells = [str(example.user_id), " → ".join(map(escape, example.clicked)), " · ".join(listed), then]
    return f'<tr data-hit="{int(example.rank > 0)}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
