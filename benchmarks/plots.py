"""SVG and PNG pictures: speed-up bars, roofline, memory, scaling."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cases import CASES, SWEEPS
from benchmarks.results import Record

_AXIS = {  # sweep -> (name, value of a shape)
    "tokens": ("text tokens", lambda shape: shape["tokens"]),
    "images": ("images", lambda shape: shape["images"]),
    "batch": ("batch", lambda shape: shape.get("batch", shape.get("items"))),
    "frames": ("frames of 256 features", lambda shape: shape["features"] // 256),
}
_STYLES = ("-", "--", ":", "-.")  # of dtypes


def write(records: list[Record], folder: Path) -> list[Path]:
    """Write all pictures of the lines; return the SVG files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flamingo_kernels"
    lines = tables.main_cache(records)
    written = []
    for op in dict.fromkeys(r["op"] for r in lines):
        of_op = [r for r in lines if r["op"] == op]
        for phase in tables.PHASES:
            figure = _speed_up(of_op, phase)
            written += _save(figure, folder, f"speed-up-{op}-{phase}")
        written += _save(_memory(of_op), folder, f"memory-{op}")
        for sweep in SWEEPS:
            for phase in ("forward", "forward_backward"):
                figure = _scaling(of_op, sweep, phase)
                written += _save(figure, folder, f"scaling-{op}-{sweep}-{phase}")
    for dtype in dict.fromkeys(r["dtype"] for r in lines):
        figure = _roofline([r for r in lines if r["dtype"] == dtype], dtype)
        written += _save(figure, folder, f"roofline-{dtype}")
    return written


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    if figure is None:
        return []
    import matplotlib.pyplot as plt

    path = folder / f"{name}.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", bbox_inches="tight", dpi=110)
    plt.close(figure)
    return [path]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height))


def _colours(peers: Iterable[str]) -> dict[str, Any]:
    import matplotlib

    palette = matplotlib.colormaps["tab20"].colors
    return {peer: palette[i % len(palette)] for i, peer in enumerate(sorted(set(peers)))}


def _listed(records: list[Record]) -> list[Record]:
    """Drop the cases that are only points of a scaling plot, unless there are no others."""
    only_points = {case.key for case in CASES if case.only_in_sweeps}
    return [r for r in records if r["case"] not in only_points] or records


def _speed_up(records: list[Record], phase: str) -> Any:
    """Speed-up over each baseline, one group of bars per case; losses lie left of the line at 1."""
    cases = tables.by_case(_listed(records), phase)
    cases = {c: lines for c, lines in cases.items() if tables.baseline(lines) and len(lines) > 1}
    if not cases:
        return None
    colours = _colours(r["peer"] for r in records)
    count = sum(len(lines) for lines in cases.values())
    figure, axes = _axes(9, 0.22 * count + 0.35 * len(cases) + 1)
    position, ticks, names, named = 0.0, [], [], set()
    for lines in cases.values():
        ours = lines[tables.baseline(lines)]
        start = position
        for peer, record in sorted(lines.items()):
            if record is ours:
                continue
            ratio = record["median_s"] / ours["median_s"]
            label = None if peer in named else peer
            axes.barh(position, ratio - 1, left=1, height=0.8, color=colours[peer], label=label)
            axes.text(max(ratio, 1), position, f" {ratio:.2f}", va="center", fontsize=7)
            named.add(peer)
            position += 1
        ticks.append((start + position - 1) / 2)
        names.append(f"{ours['label']}\n{ours['dtype']}, {ours['peer']}")
        position += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(ticks, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time over ours (above 1: ours is faster)")
    axes.set_title(f"{records[0]['op']}, {tables.PHASE_TITLES[phase]}")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _memory(records: list[Record]) -> Any:
    """Peak memory of forward and backward, and the memory held between them."""
    lines = {
        (r["case"], r["peer"]): r
        for r in _listed(records)
        if "saved_bytes" in r and r["phase"] == "forward_backward"
    }
    if not lines:
        return None
    figure, axes = _axes(9, 0.22 * len(lines) + 1.2)
    names = []
    for position, record in enumerate(lines.values()):
        first = position == 0
        for name, colour in (("peak_bytes", "tab:gray"), ("saved_bytes", "tab:orange")):
            label = {"peak_bytes": "peak", "saved_bytes": "held for the backward"}[name]
            axes.barh(
                position,
                record[name] / 1e6,
                color=colour,
                height=0.8 if name == "peak_bytes" else 0.4,
                label=label if first else None,
            )
        names.append(f"{record['label']} {record['dtype']}, {record['peer']}")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.set_title(f"{records[0]['op']}: memory of forward and backward")
    axes.legend(fontsize=7)
    return figure


def _scaling(records: list[Record], sweep: str, phase: str) -> Any:
    """Time over size, log-log, one line per peer and dtype."""
    name, value = _AXIS[sweep]
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        if sweep in record["sweeps"] and record["phase"] == phase:
            where = (value(record["shape"]), record["median_s"] * 1e3)
            points.setdefault((record["peer"], record["dtype"]), []).append(where)
    points = {line: sorted(of_line) for line, of_line in points.items() if len(of_line) > 1}
    if not points:
        return None
    colours = _colours(peer for peer, _ in points)
    styles = dict(zip(sorted({dtype for _, dtype in points}, reverse=True), _STYLES, strict=False))
    figure, axes = _axes(7, 4.5)
    for (peer, dtype), of_line in sorted(points.items()):
        axes.plot(
            *zip(*of_line, strict=True),
            marker="o",
            color=colours[peer],
            linestyle=styles[dtype],
            label=f"{peer}, {dtype}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel("ms")
    axes.grid(True, which="both", linewidth=0.3)
    axes.set_title(f"{records[0]['op']}, {tables.PHASE_TITLES[phase]}: {name}")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _roofline(records: list[Record], dtype: str) -> Any:
    """Achieved arithmetic over intensity, below the two ceilings."""
    lines = [r for r in _listed(records) if r.get("flops") and r["phase"] != "backward"]
    if not lines:
        return None
    ceilings = lines[-1]["ceilings"]
    peak = ceilings["arithmetic"][dtype] / 1e12
    colours = _colours(r["peer"] for r in lines)
    figure, axes = _axes(8, 5)
    intensities = sorted({r["flops"] / r["bytes"] for r in lines})
    grid = [intensities[0] / 4, *intensities, intensities[-1] * 4]
    for moved, rate in (min(ceilings["bandwidth"].items()), max(ceilings["bandwidth"].items())):
        roof = [min(peak, x * rate / 1e12) for x in grid]
        label = f"copy of {int(moved) / 2**20:.0f} MiB"
        axes.plot(grid, roof, color="black", linewidth=0.8, label=label)
    named = set()
    for r in lines:
        label = None if r["peer"] in named else r["peer"]
        named.add(r["peer"])
        marker = "o" if r["phase"] == "forward" else "^"
        where = (r["flops"] / r["bytes"], r["tflop_per_s"])
        axes.plot(*where, marker, color=colours[r["peer"]], label=label, markersize=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte (of the least bytes)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {dtype}; circles forward, triangles forward + backward")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
