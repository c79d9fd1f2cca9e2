"""This tree against another git revision: the same benchmark code on two versions of the package.

The revision is checked out in a temporary work tree and its native library is built there. Runs of
the two alternate as subprocesses. Both use the benchmarks, error budgets and reference of this
tree, so an old revision is measured by today's rules.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results, tables
from benchmarks.peers import load_all
from benchmarks.results import ROOT, Record

PASSES = 2


@dataclass(frozen=True)
class Change:
    """One figure of both versions: ``ratio`` is the time now over the time then."""

    case: str
    peer: str
    phase: str
    before: float
    now: float
    beyond_noise: bool

    @property
    def ratio(self) -> float:
        return self.now / self.before


def changes(before: list[Record], now: list[Record], threshold: float) -> list[Change]:
    """Return the figures that both have, the largest slow-down first.

    A change is beyond noise if the median moved by more than ``threshold`` and the ranges between
    the 20 and 80 % quantiles, over all passes, do not overlap.
    """
    then = _merged(before)
    found = []
    for key, (median, low, high) in _merged(now).items():
        if key not in then:
            continue
        old_median, old_low, old_high = then[key]
        moved = abs(median / old_median - 1) > threshold
        apart = low > old_high or high < old_low
        case, peer, phase, _ = key
        found.append(Change(case, peer, phase, old_median, median, moved and apart))
    return sorted(found, key=lambda change: -change.ratio)


def _merged(records: list[Record]) -> dict[tuple[str, ...], tuple[float, float, float]]:
    """Key -> (best median, lowest 20 %, highest 80 %) over the passes."""
    merged: dict[tuple[str, ...], tuple[float, float, float]] = {}
    for r in records:
        if r["status"] != "ok":
            continue
        key = (r["case"], r["peer"], r["phase"], r["cache"])
        values = (r["median_s"], r["q20_s"], r["q80_s"])
        if key in merged:
            old = merged[key]
            values = (min(old[0], values[0]), min(old[1], values[1]), max(old[2], values[2]))
        merged[key] = values
    return merged


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """Yield a temporary work tree of ``ref`` with its native library built.

    Raises
    ------
    ValueError
        Git does not know the revision; the message is git's.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        tree = Path(folder) / "tree"
        add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), ref]
        done = subprocess.run(add, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"no work tree of {ref!r}: {done.stderr.strip()}")
        try:
            _build(tree)
            yield tree
        finally:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)]
            subprocess.run(remove, capture_output=True, check=False)


def _build(tree: Path) -> None:
    """Build the native library; without a compiler the C++ kernels are not compared."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the native library of {tree.name} was not built", file=sys.stderr)


def _overlay(folder: Path, package: Path) -> Path:
    """Make a folder with this tree's benchmark code and the package of another tree."""
    folder.mkdir()
    for name in ("benchmarks", "testing", "reference"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    (folder / "flamingo_kernels").symlink_to(package, target_is_directory=True)
    return folder


def _measure(overlay: Path, output: Path, arguments: list[str]) -> list[Record]:
    command = [sys.executable, "-m", "benchmarks", "run", *arguments]
    command += ["--output", str(output), "--fresh"]
    environment = {**os.environ, "PYTHONPATH": str(overlay)}
    subprocess.run(command, cwd=overlay, env=environment, check=True, stdout=subprocess.DEVNULL)
    return [r for path in output.rglob("*.jsonl") for r in results.read(path)]


def run_arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments of ``run``: this library's kernels only, unless peers are named."""
    peers = options.peers or [name for name in load_all() if tables.is_own(name)]
    arguments = ["--suite", options.suite, "--peers", *peers]
    if options.ops:
        arguments += ["--ops", *options.ops]
    if options.cases:
        arguments += ["--cases", options.cases]
    if options.device:
        arguments += ["--device", options.device]
    if options.budget_minutes:
        each = options.budget_minutes / (2 * PASSES)
        arguments += ["--budget-minutes", str(each)]
    return arguments


def main(options: argparse.Namespace) -> int:
    """Print the comparison; 1 if there are regressions beyond noise."""
    arguments = run_arguments(options)
    before: list[Record] = []
    now: list[Record] = []
    with checkout(options.ref) as tree, tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        sides = (
            (before, _overlay(base / "before", tree / "flamingo_kernels")),
            (now, _overlay(base / "now", ROOT / "flamingo_kernels")),
        )
        for number in range(PASSES):
            for records, overlay in sides:
                output = base / f"{overlay.name}-{number}"
                records += _measure(overlay, output, arguments)
                shutil.rmtree(output, ignore_errors=True)
    found = changes(before, now, options.threshold)
    for line in lines(found, options.ref):
        print(line)
    return int(any(c.beyond_noise and c.ratio > 1 for c in found))


def lines(found: list[Change], ref: str) -> Iterator[str]:
    """Yield the comparison as text, slow-downs first."""
    if not found:
        yield f"nothing that both this tree and {ref} can measure"
        return
    yield f"time now over time at {ref}; '!' beyond noise"
    for c in found:
        mark = "!" if c.beyond_noise else " "
        yield (
            f"{mark} {c.ratio:6.2f}  {c.before * 1e3:9.3f} -> {c.now * 1e3:9.3f} ms  "
            f"{c.case} {c.peer} {c.phase}"
        )
    slower = sum(c.beyond_noise and c.ratio > 1 for c in found)
    faster = sum(c.beyond_noise and c.ratio < 1 for c in found)
    yield f"{slower} regressions and {faster} improvements beyond noise in {len(found)} figures"
