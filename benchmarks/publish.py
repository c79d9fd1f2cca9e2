"""The published figures: a summary in ``README.md``, every table in ``docs/benchmarks.md``.

Both files hold two markers; what stands between them is generated from ``benchmarks/results``.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from itertools import product
from pathlib import Path

from benchmarks import report, results, tables
from benchmarks.peers import load_all
from benchmarks.results import Record
from benchmarks.tables import Table, number, text

BEGIN, END = "<!-- figures: python -m benchmarks publish -->", "<!-- end of figures -->"
README, PAGE = Path("README.md"), Path("docs/benchmarks.md")
SUMMARY = (
    ("media_cross_attention", "forward"),
    ("media_cross_attention", "backward"),
    ("key_ranges", "forward"),
    ("key_ranges", "forward_backward"),
    ("latent_attention", "forward"),
    ("latent_attention", "backward"),
    ("block", "forward"),
    ("resampler", "backward"),
    ("layer_norm", "forward"),
    ("gated_activation", "backward"),
)
_PICTURES = (
    *(
        f"speed-up-{op}-{phase}"
        for op in ("media_cross_attention", "key_ranges", "latent_attention", "block")
        for phase in ("forward", "forward_backward")
    ),
    "scaling-media_cross_attention-images-forward",
)


def publish(root: Path) -> list[Path]:
    """Write the newest report of each device beside its results, and the figures of both pages.

    Parameters
    ----------
    root : Path
        The folder of ``README.md`` and ``docs/benchmarks.md``.

    Returns
    -------
    list of Path
        The files written, pictures excluded.

    Raises
    ------
    ValueError
        No results, results of a changed tree, or a page without the two markers; nothing is
        written then.
    """
    render(root)  # raises before anything is written
    written = []
    for folder, records in _latest().items():
        for old in folder.glob("*"):
            old.unlink()
        written += report.write_one(records, folder)
    for page, content in render(root).items():
        page.write_text(content)
        written.append(page)
    return written


def render(root: Path) -> dict[Path, str]:
    """Return the text of both pages with the figures of the newest results; write nothing."""
    latest = _latest()
    sections: dict[Path, list[str]] = {README: _summary([*latest.values()]), PAGE: []}
    for folder, records in latest.items():
        sections[PAGE] += _device(records, folder, root)
    sections[PAGE] += ["## Baselines", "", *report.markdown_table(peers_table()), ""]
    return {root / page: _filled(root / page, lines) for page, lines in sections.items()}


def _latest() -> dict[Path, list[Record]]:
    """Map the folder of each device's report to its newest results."""
    found = {}
    for (device, commit, dirty), records in report.load(None).items():
        if dirty:
            raise ValueError(
                f"the newest results of {device} are of a changed tree ({commit[:12]}): commit, "
                "measure again, then publish"
            )
        found[results.RESULTS / device / "report"] = records
    return found


def _filled(page: Path, lines: list[str]) -> str:
    """Return the text of a page with ``lines`` between its markers."""
    before, *rest = page.read_text().split(BEGIN)
    parts = rest[0].split(END) if len(rest) == 1 else []
    if len(parts) != 2:
        raise ValueError(f"{page} needs the lines {BEGIN} and {END} once each")
    return "\n".join([before + BEGIN, "", *lines, END + parts[1]])


def _measured_on(records: list[Record]) -> str:
    last = records[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return (
        f"{last['device_name']}, {last['threads']} threads, {last['instruction_set']}; commit "
        f"{last['commit'][:12]}; {versions}"
    )


def _summary(devices: list[list[Record]]) -> list[str]:
    """Return one table of all devices, and what they are."""
    names = [f"[{number}]" for number, _ in enumerate(devices, 1)]
    decodings = (_other_figures(records[-1]["device"], tables.DECODING_FILE) for records in devices)
    return [
        *report.markdown_table(summary_table(dict(zip(names, devices, strict=True)))),
        "",
        "Speed-up over the fastest baseline of each case (baseline time / our time, higher is "
        "better, below 1 the baseline is faster), measured in the same run. "
        + " ".join(tables.decoding_sentence(decoding) for decoding in decodings if decoding),
        *(f"{name} {_measured_on(of)}." for name, of in zip(names, devices, strict=True)),
    ]


def summary_table(devices: dict[str, list[Record]]) -> Table:
    """Return one row for each of ``SUMMARY`` that was measured: ours beside the fastest baselines.

    The library's own kernels are no baselines here. Our time is that of the case at the median.
    """
    columns = ["op", "phase", "on", "cases", "fastest baseline", "median", "worst"]
    table = Table("", [*columns, "our time, at the median"])
    for (op, phase), (device, records) in product(SUMMARY, devices.items()):
        fastest: dict[str, tuple[float, str]] = {}
        for peer, found in tables.speed_ups(records, op, phase).items():
            if not tables.is_own(peer):
                for case, speed_up in found.items():
                    fastest[case] = min(fastest.get(case, (speed_up, peer)), (speed_up, peer))
        if not fastest:
            continue
        values = [speed_up for speed_up, _ in fastest.values()]
        ((peer, count),) = Counter(peer for _, peer in fastest.values()).most_common(1)
        middle = next(c for c in fastest if fastest[c][0] == statistics.median_low(values))
        lines = tables.by_case(records, phase)[middle]
        ours = lines[tables.baseline(lines)]
        table.rows.append(
            [
                text(op),
                text(tables.PHASE_TITLES[phase]),
                text(device),
                number(len(fastest), "{:.0f}"),
                text(f"{peer} ({count} of {len(fastest)})"),
                number(statistics.median(values), "{:.2f}"),
                number(min(values), "{:.2f}"),
                text(f"{_milliseconds(ours['median_s'])} ms ({tables.case_name(ours)})"),
            ]
        )
    return table


def _milliseconds(seconds: float) -> str:
    """Format a time with three digits and without an exponent."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.3g}"


def _device(records: list[Record], folder: Path, root: Path) -> list[str]:
    """Return the section of one device, whose report is in ``folder``."""
    link = os.path.relpath(folder, (root / PAGE).parent)
    name = f"{records[-1]['device_name']}, {records[-1]['instruction_set']}"
    lines = [
        f"## {name}",
        "",
        f"{_measured_on(records)}.",
        "",
        f"### {name}: speed-up over each baseline",
        "",
        "Speed-up over each baseline (baseline time / our time, higher is better): median, min, "
        "max over cases measured in the same run. Below 1 the baseline is faster. "
        f"[Every figure of every case]({link}/index.html), also in "
        f"`{folder.relative_to(root)}/report.md`.",
        "",
        *report.markdown_table(speed_up_table(records)),
        "",
    ]
    lines += [f"![{p}]({link}/{p}.svg)" for p in _PICTURES if (folder / f"{p}.svg").exists()]
    device = records[-1]["device"]
    decoding = _other_figures(device, tables.DECODING_FILE)
    overhead = _other_figures(device, tables.OVERHEAD_FILE)
    if decoding:
        lines += ["", f"### {name}: few-shot decoding", "", *tables.decoding_lines(decoding)]
    if overhead:
        lines += ["", f"### {name}: overhead of a call", "", *tables.overhead_lines(overhead)]
    missing, ops = tables.unmeasured(records), tables.unmeasured_ops(records)
    if ops:
        lines += ["", f"No case was measured here of {', '.join(ops)}."]
    if missing:
        lines += ["", f"### {name}: not measured", "", *(f"- `{key}`" for key in missing)]
    return [*lines, ""]


def _other_figures(device: str, name: str) -> Record | None:
    """Read what ``decode_model`` or ``call_overhead`` wrote for a device."""
    path = results.RESULTS / device / name
    return json.loads(path.read_text()) if path.exists() else None


def speed_up_table(records: list[Record]) -> Table:
    """Return one row for each op, phase and baseline."""
    table = Table("", ["op", "phase", "baseline", "cases", "median", "min", "max"])
    for op in dict.fromkeys(r["op"] for r in records):
        for phase in tables.PHASES:
            for peer, found in tables.speed_ups(records, op, phase).items():
                values = found.values()
                row = [text(op), text(tables.PHASE_TITLES[phase]), text(peer)]
                row += [number(len(values), "{:.0f}")]
                of_cases = (statistics.median(values), min(values), max(values))
                table.rows.append([*row, *(number(value, "{:.2f}") for value in of_cases)])
    return table


def peers_table() -> Table:
    """Return every registered peer with its description."""
    table = Table("", ["name", "what it is", "measured on", "devices"])
    for peer in load_all().values():
        cells = (f"`{peer.name}`", peer.description, ", ".join(peer.ops), ", ".join(peer.devices))
        table.rows.append([text(cell) for cell in cells])
    return table
