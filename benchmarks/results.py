"""Result files: one JSON line per measurement, one file per device and commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from testing import provenance

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]


def environment(device: str) -> Record:
    """Return what every line of a run has in common."""
    return {"schema": SCHEMA, **provenance.environment(device)}


def clean_environment(folder: Path) -> Record:
    """Return :func:`environment` of the CPU, for figures to be written to ``folder``.

    Raises
    ------
    SystemExit
        The tree differs from its commit, and ``folder`` is that of the committed results.
    """
    found = environment("cpu")
    if found["dirty"] and folder == RESULTS:
        raise SystemExit("the working tree differs from its commit: commit first, or give --output")
    return found


def write_beside(name: str, record: Record, folder: Path) -> Path:
    """Write ``<folder>/<device>/<name>``, in place of an older one."""
    path = folder / record["device"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def file_for(environment: Record, folder: Path) -> Path:
    """Return ``<folder>/<device>/<commit>[-dirty].jsonl``."""
    suffix = "-dirty" if environment["dirty"] else ""
    return folder / environment["device"] / f"{environment['commit'][:12]}{suffix}.jsonl"


def append(path: Path, record: Record) -> None:
    """Add one line at once, so that an interrupted run keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def read(path: Path) -> list[Record]:
    """Read all lines of a file; a truncated last line is ignored.

    Raises
    ------
    ValueError
        Another line is not JSON, or has another schema; the message names file and line.
    """
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if record.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number}: schema {record.get('schema')!r}, not {SCHEMA}")
        records.append(record)
    return records


def done_cases(records: Iterable[Record], environment: Record) -> dict[str, set[str]]:
    """Map each case to its peers with a line from the same tree, threads and instruction set."""
    same = ("commit", "dirty", "device", "threads", "instruction_set")
    done: dict[str, set[str]] = {}
    for record in records:
        if all(record[name] == environment[name] for name in same):
            done.setdefault(record["case"], set()).add(record["peer"])
    return done


def newest(records: Iterable[Record]) -> list[Record]:
    """Keep the last measurement of each (case, peer)."""
    lines: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = (record["case"], record["peer"])
        if lines.get(key) and lines[key][0]["run"] != record["run"]:
            lines[key] = []
        lines.setdefault(key, []).append(record)
    return [record for group in lines.values() for record in group]
