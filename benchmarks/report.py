"""Markdown, plots and one HTML page from result files; one folder per device and commit."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from benchmarks import ceilings, page, plots, results, tables
from benchmarks.results import Record
from benchmarks.tables import Table

BEGIN, END = "<!-- figures: python -m benchmarks publish -->", "<!-- end of figures -->"
_SHOWN = ("media_cross_attention", "latent_attention", "block")


def load(paths: list[Path] | None) -> dict[tuple[str, str, str], list[Record]]:
    """Lines by (device, commit, dirty digest), the newest measurement of each case and peer.

    Without paths: for every device the file of the latest run. Lines of other threads or another
    instruction set than those of the file's latest run are left out. Ceilings are the highest of a
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
    """Lines with the ceilings and floors that the runs of a commit have in common."""
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
    """Write report.md, index.html and pictures below ``output``; returns the pages."""
    pages = []
    for (device, commit, dirty), records in load(paths).items():
        folder = output / device / (commit[:12] + (f"-{dirty}" if dirty else ""))
        pages += _write_one(records, folder)
    return pages


def publish(readme: Path) -> list[Path]:
    """Write the newest report of each device beside its results, and the README's figures.

    Raises
    ------
    ValueError
        No results, results of a changed tree, or a README without the two markers.
    """
    section, written = [], []
    for (device, commit, dirty), records in load(None).items():
        if dirty:
            raise ValueError(
                f"the newest results of {device} are of a changed tree ({commit[:12]}): commit, "
                "measure again, then publish"
            )
        folder = results.RESULTS / device / "report"
        for old in folder.glob("*"):
            old.unlink()
        written += _write_one(records, folder)
        section += _readme_section(records, folder.relative_to(readme.parent))
    text = readme.read_text()
    found = re.subn(
        re.escape(BEGIN) + ".*?" + re.escape(END),
        lambda match: "\n".join([BEGIN, "", *section, END]),
        text,
        flags=re.DOTALL,
    )
    if found[1] != 1:
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END} once each")
    readme.write_text(found[0])
    return [*written, readme]


def _write_one(records: list[Record], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = tables.all_tables(records)
    pictures = plots.write(records, folder)
    markdown = folder / "report.md"
    markdown.write_text(_markdown(records, found, [p.name for p in pictures]))
    html = folder / "index.html"
    html.write_text(page.render(records, found, pictures))
    return [markdown, html]


def _readme_section(records: list[Record], folder: Path) -> list[str]:
    """Medians over cases for each op and peer, and the pictures of the ops."""
    last = records[-1]
    lines = [
        f"### {last['device_name']}, {last['threads']} threads, {last['instruction_set']}",
        "",
        f"Commit {last['commit'][:12]}, torch {last['versions']['torch']}. How many times as long "
        "as ours each peer takes: median over the cases of an op, lowest and highest; below 1 it "
        "is faster than ours. Only pairs of one run are counted. "
        f"[Every figure]({folder}/report.md).",
        "",
        *markdown_table(_ratio_summary(records)),
        "",
    ]
    names = [f"speed-up-{op}-{phase}" for op in _SHOWN for phase in ("forward", "forward_backward")]
    for name in [*names, "scaling-media_cross_attention-images-forward"]:
        if (results.ROOT / folder / f"{name}.svg").exists():
            lines.append(f"![{name}]({folder}/{name}.svg)")
    for name, lines_of in (
        (tables.DECODING_FILE, tables.decoding_lines),
        (tables.OVERHEAD_FILE, tables.overhead_lines),
    ):
        path = results.ROOT / folder.parent / name
        if path.exists():
            lines += ["", *lines_of(json.loads(path.read_text()))]
    missing = tables.unmeasured(records)
    lines += ["", f"Not measured there: {len(missing)} cases of the full suite."] if missing else []
    return [*lines, ""]


def _ratio_summary(records: list[Record]) -> Table:
    table = Table("", ["op", "phase", "peer", "cases", "median", "lowest", "highest"])
    for op in dict.fromkeys(r["op"] for r in records):
        for phase in tables.PHASES[::2]:
            ratios: dict[str, list[float]] = {}
            of_op = [r for r in records if r["op"] == op]
            for lines in tables.by_case(of_op, phase).values():
                ours = tables.baseline(lines)
                for peer in lines if ours else ():
                    if peer != ours and lines[peer]["run"] == lines[ours]["run"]:
                        ratio = lines[peer]["median_s"] / lines[ours]["median_s"]
                        ratios.setdefault(peer, []).append(ratio)
            for peer, found in ratios.items():
                values = (statistics.median(found), min(found), max(found))
                row = [tables.text(op), tables.text(tables.PHASE_TITLES[phase]), tables.text(peer)]
                row += [tables.number(len(found)), *(tables.number(v, "{:.2f}") for v in values)]
                table.rows.append(row)
    return table


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
    """Lines of a Markdown table."""
    rows = [table.columns, ["---"] * len(table.columns)]
    rows += [[cell.text.replace("|", "\\|") for cell in row] for row in table.rows]
    return ["| " + " | ".join(row) + " |" for row in rows]
