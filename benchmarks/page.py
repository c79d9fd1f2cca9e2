"""One self-contained HTML page: sortable tables and pictures, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from benchmarks import tables
from benchmarks.results import Record
from benchmarks.tables import Table

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem;
       padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; font-size: 12px; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
td.text, th.text { text-align: left; }
th { cursor: pointer; background: #f4f4f4; position: sticky; top: 0; }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
.scroll { overflow: auto; max-height: 42rem; }
img { max-width: 100%; }
input { font: inherit; margin: .3rem 0; width: 20rem; }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const numeric = !head.classList.contains("text");
    const rows = [...body.rows].sort((a, b) => numeric
      ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
    body.append(...(down ? rows.reverse() : rows));
  }));
  const filter = table.closest("section").querySelector("input");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase().split(/\\s+/);
    for (const row of body.rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !wanted.every(word => content.includes(word));
    }
  });
}
"""


def render(records: list[Record], found: list[Table], pictures: list[Path]) -> str:
    """Return the page as text."""
    title = f"Benchmarks on {records[-1]['device_name']}"
    facts = "".join(f"<li>{escape(line)}</li>" for line in tables.environment_lines(records))
    missing = tables.unmeasured(records)
    unmeasured = ""
    if missing:
        items = "".join(f"<li>{escape(key)}</li>" for key in missing)
        unmeasured = (
            f"<details><summary>{len(missing)} cases of the full suite without a figure"
            f"</summary><ul>{items}</ul></details>"
        )
    images = "".join(_picture(path) for path in pictures)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><ul>{facts}</ul>"
        f"{unmeasured}{''.join(map(_table, found))}<h2>Plots</h2>{images}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(table: Table) -> str:
    kinds = [
        "text" if table.rows and isinstance(table.rows[0][i].value, str) else "number"
        for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th class="{kind}">{escape(name)}</th>'
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-value="{escape(str(cell.value))}">{escape(cell.text)}</td>'
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f"<section><h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
        f'<input type="search" placeholder="filter rows" aria-label="filter rows">'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.stem)
    return f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{data}"></figure>'
