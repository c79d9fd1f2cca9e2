"""Markdown, plots and one HTML page from result files; one folder per device and commit."""

from __future__ import annotations

from pathlib import Path

from benchmarks import ceilings, page, plots, results, tables
from benchmarks.results import Record
from benchmarks.tables import Table


def load(paths: list[Path] | None) -> dict[tuple[str, str, str], list[Record]]:
    """Read the newest measurement of each case and peer, by (device, commit, dirty digest).

    Without paths, the file of the latest run of every device is read. Lines with other threads or
    another instruction set than the file's latest run are left out. Ceilings are the highest of a
    commit's runs.

    Raises
    ------
    ValueError
        No results, or a broken file.
    """
    if paths is None:
        folders = [f for f in sorted(results.RESULTS.glob("*")) if f.is_dir()]
        found = [sorted(f.glob("*.jsonl"), key=_latest_run)[-1:] for f in folders]
        files = [file for group in found for file in group]
    else:
        files = []
        for path in paths:
            files += sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"no such result file: {file}")
        for record in results.read(file):
            key = (record["device"], record["commit"], record["dirty"])
            groups.setdefault(key, []).append(record)
    if not groups:
        raise ValueError(f"no results in {', '.join(map(str, paths or [results.RESULTS]))}")
    return {
        key: results.newest(_under_highest_ceilings(_of_latest_setting(records)))
        for key, records in groups.items()
    }


def _latest_run(file: Path) -> str:
    return max((record["run"] for record in results.read(file)), default="")


def _of_latest_setting(records: list[Record]) -> list[Record]:
    settings = ("threads", "instruction_set")
    latest = max(records, key=lambda record: record["run"])
    return [r for r in records if all(r[name] == latest[name] for name in settings)]


def _under_highest_ceilings(records: list[Record]) -> list[Record]:
    """Judge all lines by the highest ceilings of the runs of their commit."""
    best = ceilings.highest(ceilings.Ceilings(**record["ceilings"]) for record in records)
    judged = []
    for record in records:
        record = {**record, "ceilings": best.to_dict()}
        if "bytes" in record:
            floor = best.floor_seconds(record["bytes"], record["flops"], record["dtype"])
            record |= {"floor_s": floor, "of_floor": floor / record["median_s"]}
        judged.append(record)
    return judged


def write(paths: list[Path] | None, output: Path) -> list[Path]:
    """Write report.md, index.html and pictures below ``output``; return the pages."""
    pages = []
    for (device, commit, dirty), records in load(paths).items():
        folder = output / device / (commit[:12] + (f"-{dirty}" if dirty else ""))
        pages += write_one(records, folder)
    return pages


def write_one(records: list[Record], folder: Path) -> list[Path]:
    """Write report.md, index.html and pictures of one device and commit; return the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tables.all_tables(records)
    pictures = plots.write(records, folder)
    markdown = folder / "report.md"
    markdown.write_text(_markdown(records, found, [p.name for p in pictures]))
    html = folder / "index.html"
    html.write_text(page.render(records, found, pictures))
    return [markdown, html]


def _markdown(records: list[Record], found: list[Table], pictures: list[str]) -> str:
    lines = [f"# Benchmarks on {records[-1]['device_name']}", ""]
    lines += [f"- {line}" for line in tables.environment_lines(records)]
    missing = tables.unmeasured(records)
    if missing:
        lines += ["", f"Not measured in these files: {len(missing)} cases of the full suite."]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    for table in found:
        lines += ["", f"## {table.title}", ""]
        if table.note:
            lines += [table.note, ""]
        lines += markdown_table(table)
    if missing:
        lines += ["", "## Cases of the full suite without a figure", ""]
        lines += [f"- {key}" for key in missing]
    return "\n".join(lines) + "\n"


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a Markdown table."""
    rows = [table.columns, ["---"] * len(table.columns)]
    rows += [[cell.text.replace("|", "\\|") for cell in row] for row in table.rows]
    return ["| " + " | ".join(row) + " |" for row in rows]
