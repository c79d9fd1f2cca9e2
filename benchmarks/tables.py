"""Tables of result lines, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.cases import CASES, OPS
from benchmarks.results import Record

# Beside the result files.
DECODING_FILE = "decode_model.json"
OVERHEAD_FILE = "call_overhead.json"
PHASES = ("forward", "backward", "forward_backward")
PHASE_TITLES = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
}
# The peers that are this library's own, by the part of their names before the kernel.
OWN_KINDS = ("ours", "module", "model")
# The kernel that the others are compared with: the first of these that was measured.
OURS = tuple(
    f"{kind}-{kernel}" for kernel in ("triton", "cpp", "auto", "torch") for kind in OWN_KINDS
)


class Cell(NamedTuple):
    """A text, and the value that it sorts by."""

    text: str
    value: float | str


@dataclass
class Table:
    """A title, a note, and rows of cells."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""


def text(value: object) -> Cell:
    """Return a cell that sorts as text."""
    return Cell(str(value), str(value))


def number(value: float | None, pattern: str = "{:.3g}", scale: float = 1.0) -> Cell:
    """Return a cell that sorts as a number; it is empty where there is none."""
    if value is None:
        return Cell("", -1.0)
    return Cell(pattern.format(value * scale), value * scale)


def measured(records: Iterable[Record]) -> list[Record]:
    """Return the lines with a figure."""
    return [r for r in records if r["status"] == "ok"]


def main_cache(records: Iterable[Record]) -> list[Record]:
    """Return one line per (case, peer, phase): cold cache where it was measured, else warm."""
    best: dict[tuple[str, str, str], Record] = {}
    for record in measured(records):
        if record["cache"] == "wall":
            continue
        key = (record["case"], record["peer"], record["phase"])
        if key not in best or record["cache"] == "cold":
            best[key] = record
    return list(best.values())


def baseline(peers: Iterable[str]) -> str | None:
    """Return the peer of ours that the others are compared with."""
    present = set(peers)
    return next((name for name in OURS if name in present), None)


def is_own(peer: str) -> bool:
    """Say whether a peer is one of this library's kernels, modules or models."""
    return peer.split("-")[0] in OWN_KINDS


def by_case(records: Iterable[Record], phase: str) -> dict[str, dict[str, Record]]:
    """Map case to peer to line."""
    found: dict[str, dict[str, Record]] = {}
    for record in main_cache(records):
        if record["phase"] == phase:
            found.setdefault(record["case"], {})[record["peer"]] = record
    return found


def speed_ups(records: Iterable[Record], op: str, phase: str) -> dict[str, dict[str, float]]:
    """Map baseline to case to speed-up (baseline time / our time), measured in the same run."""
    found: dict[str, dict[str, float]] = {}
    for case, lines in by_case((r for r in records if r["op"] == op), phase).items():
        ours = baseline(lines)
        for peer in lines if ours else ():
            if peer != ours and lines[peer]["run"] == lines[ours]["run"]:
                speed_up = lines[peer]["median_s"] / lines[ours]["median_s"]
                found.setdefault(peer, {})[case] = speed_up
    return found


def case_name(record: Record) -> str:
    """Return the shape and dtype of a line."""
    return f"{record['label']}, {record['dtype']}"


def ratio_table(records: list[Record], op: str, phase: str) -> Table | None:
    """Return the speed-up over each baseline in every case."""
    cases = by_case([r for r in records if r["op"] == op], phase)
    cases = {case: lines for case, lines in cases.items() if baseline(lines)}
    peers = list(dict.fromkeys(peer for lines in cases.values() for peer in lines))
    if not cases or len(peers) < 2:
        return None
    table = Table(
        f"{op}, {PHASE_TITLES[phase]}: speed-up over each baseline",
        ["case", "ours", "ours, ms", *peers],
        note="Baseline time / our time, higher is better; below 1 the baseline is faster. Empty: "
        "not measured, see below. * measured in another run than ours.",
    )
    for lines in cases.values():
        ours = lines[baseline(lines)]
        row = [text(case_name(ours)), text(ours["peer"]), number(ours["median_s"], scale=1e3)]
        for peer in peers:
            other = lines.get(peer)
            ratio = other["median_s"] / ours["median_s"] if other else None
            mark = "*" if other and other["run"] != ours["run"] else ""
            row.append(number(ratio, "{:.2f}" + mark))
        table.rows.append(row)
    return table


def detail_table(records: list[Record], op: str) -> Table | None:
    """Return every figure of an op."""
    lines = [r for r in measured(records) if r["op"] == op]
    if not lines:
        return None
    table = Table(
        f"{op}: all figures",
        [
            "case",
            "peer",
            "phase",
            "cache",
            "median ms",
            "20 % ms",
            "80 % ms",
            "GB/s",
            "TFLOP/s",
            "% of floor",
            "held MB",
            "peak MB",
            "prepare ms",
            "tokens/s",
            "backend",
        ],
        note="Floor: the least time by the two ceilings for the least bytes and operations. Held: "
        "kept between forward and backward. Prepare: once per step, not part of the time.",
    )
    for r in lines:
        table.rows.append(
            [
                text(case_name(r)),
                text(r["peer"]),
                text(PHASE_TITLES[r["phase"]]),
                text(r["cache"]),
                *(number(r[name], scale=1e3) for name in ("median_s", "q20_s", "q80_s")),
                number(r.get("gb_per_s")),
                number(r.get("tflop_per_s")),
                number(r.get("of_floor"), "{:.0f}", 100),
                number(r.get("saved_bytes"), "{:.1f}", 1e-6),
                number(r.get("peak_bytes"), "{:.1f}", 1e-6),
                number(r.get("prepare_s"), scale=1e3),
                number(r.get("tokens_per_s")),
                text(r["backend"]),
            ]
        )
    return table


def growth_table(records: list[Record]) -> Table | None:
    """Return the time of a decoding step with the most images over that with the fewest."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in main_cache(records):
        if record["group"]:
            groups.setdefault((record["group"], record["peer"]), []).append(record)
    table = Table(
        "Decoding step: cost of earlier images",
        ["step", "peer", "images", "ms", "images", "ms", "ratio"],
        note="One row per peer: fewest and most images, measured in the same rounds.",
    )
    for (group, peer), lines in groups.items():
        lines.sort(key=_images)
        few, many = lines[0], lines[-1]
        if _images(few) == _images(many):
            continue
        row = [text(group), text(peer)]
        for record in (few, many):
            row += [number(_images(record), "{:.0f}"), number(record["median_s"], scale=1e3)]
        table.rows.append([*row, number(many["median_s"] / few["median_s"], "{:.2f}")])
    return table if table.rows else None


def _images(record: Record) -> int:
    shape = record["shape"]
    return shape.get("media", shape)["images"]


def missing_table(records: list[Record]) -> Table | None:
    """Return the peers that could not run or failed the gate, and why."""
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for r in records:
        if r["status"] != "ok" or r["reason"]:
            status = "no backward" if r["status"] == "ok" else r["status"]
            key = (r["op"], r["peer"], status, r["reason"])
            name = case_name(r)
            if name not in reasons.setdefault(key, []):
                reasons[key].append(name)
    table = Table(
        "Not measured, and why",
        ["op", "peer", "status", "reason", "cases"],
        note="Red: the result was wrong, so there is no figure.",
    )
    for key, cases in sorted(reasons.items()):
        shown = "; ".join(cases) if len(cases) < 4 else f"{len(cases)} cases"
        table.rows.append([*map(text, key), text(shown)])
    return table if table.rows else None


def unmeasured(records: list[Record]) -> list[str]:
    """Return the cases for this kind of device without any figure, of ops that were measured."""
    kind = records[0]["device"].split("-")[0]
    seen = {r["case"] for r in records if r["status"] == "ok"}
    ops = {r["op"] for r in records}
    cases = (case for case in CASES if kind in case.devices and case.op in ops)
    return [case.key for case in cases if case.key not in seen]


def unmeasured_ops(records: list[Record]) -> list[str]:
    """Return the ops of which no case was measured."""
    ops = {r["op"] for r in records}
    return [op for op in OPS if op not in ops]


def all_tables(records: list[Record]) -> list[Table]:
    """Return all tables, in the order of the page."""
    ops = list(dict.fromkeys(r["op"] for r in records))
    tables = [ratio_table(records, op, phase) for op in ops for phase in PHASES]
    tables += [growth_table(records)]
    tables += [detail_table(records, op) for op in ops]
    tables += [missing_table(records)]
    return [table for table in tables if table is not None]


def environment_lines(records: list[Record]) -> list[str]:
    """Say in lines what the figures were measured on."""
    last = records[-1]
    ceilings = last["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    dirty = f", with changes ({last['dirty']})" if last["dirty"] else ""
    copies = ", ".join(
        f"{int(moved) / 2**20:.0f} MiB {rate / 1e9:.1f}"
        for moved, rate in sorted(ceilings["bandwidth"].items(), key=lambda item: int(item[0]))
    )
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.3g} TFLOP/s ({ceilings['source'][dtype]})"
        for dtype, rate in ceilings["arithmetic"].items()
    )
    lines = [
        f"device: {last['device_name']}, {last['threads']} threads, {last['instruction_set']}",
        f"commit: {last['commit'][:12]}{dirty}; last run {last['run']}",
        f"versions: {versions}",
        f"copy bandwidth by bytes moved, GB/s: {copies}",
        f"arithmetic: {rates}",
    ]
    return lines + ([f"driver: {last['driver']}"] if last["driver"] else [])


def decoding_sentence(record: Record) -> str:
    """Return the result of ``decode_model`` in one sentence."""
    return (
        f"Decoding with transformers' `generate`, float32 ({record['setting']}; commit "
        f"{record['commit'][:12]}): a step with {record['images']} images is "
        f"{record['times_as_fast']:.1f} times as fast as open-flamingo's and takes "
        f"{record['many_images_over_one']:.3f} times as long as a step with one image."
    )


def decoding_lines(record: Record) -> list[str]:
    """Return the figures of ``decode_model`` as Markdown."""
    lines = [
        decoding_sentence(record),
        "",
        "| | step, ms | 20 % | 80 % | tokens/s | with the prompt, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in record["figures"].items():
        median, low, high = (found[key] * 1e3 for key in ("median_s", "q20_s", "q80_s"))
        lines.append(
            f"| {name} | {median:.1f} | {low:.1f} | {high:.1f} | {1e3 / median:.1f} | "
            f"{found['with_prompt_s']:.2f} |"
        )
    return lines


def overhead_lines(record: Record) -> list[str]:
    """Return the figures of ``call_overhead`` as Markdown."""
    lines = [
        "One call of the C++ kernel with the smallest tensors and no gradients (commit "
        f"{record['commit'][:12]}): medians in microseconds. The overhead is the call less its "
        "kernel.",
        "",
        "| op | call | its kernel | overhead | lowest overhead | torch's nearest operator |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("call", "kernel", "overhead", "lowest_overhead", "torch")
    for name, found in record["figures"].items():
        lines.append(f"| {name} | " + " | ".join(f"{found[key]:.1f}" for key in keys) + " |")
    return lines
