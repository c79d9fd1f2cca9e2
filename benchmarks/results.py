"""Result files: one JSON line per measurement, one file per device and commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import flamingo_kernels

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "einops",
    "open-flamingo",
    "flamingo-pytorch",
    "flash-attn",
)
Record = dict[str, Any]


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else ""


def revision() -> tuple[str, str]:
    """(commit, digest of what differs from it) of the tree that ``flamingo_kernels`` is run from.

    The digest is empty for a clean tree; result files do not count as a difference.
    """
    folder = Path(flamingo_kernels.__file__).resolve().parent.parent
    commit = _git(folder, "rev-parse", "HEAD").strip() or "unknown"
    paths = ("--", ".", ":(exclude)benchmarks/results")
    changed = _git(folder, "status", "--porcelain", *paths)
    if not changed and commit != "unknown":
        return commit, ""
    digest = hashlib.sha256(_git(folder, "diff", "HEAD", *paths).encode())
    for name in _git(folder, "ls-files", "--others", "--exclude-standard", *paths).splitlines():
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return commit, digest.hexdigest()[:8]


def device_name(device: str) -> str:
    """Model of the processor or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def device_slug(device: str) -> str:
    """Folder name such as ``cpu-amd-epyc-2c`` or ``cuda-nvidia-h200``."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    cores = f"-{len(os.sched_getaffinity(0))}c" if device == "cpu" else ""
    return f"{device}-{name}{cores}"


def _driver(device: str) -> str:
    if device != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0]


def _instruction_set(device: str) -> str:
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    from flamingo_kernels._cpp import library

    own = library.unavailable_reason() or library.selected_instruction_set()
    return f"torch {torch.backends.cpu.get_cpu_capability()}, native {own}"


def environment(device: str) -> Record:
    """What every line of a run has in common."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    commit, dirty = revision()
    return {
        "schema": SCHEMA,
        "commit": commit,
        "dirty": dirty,
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_slug(device),
        "device_name": device_name(device),
        "driver": _driver(device),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(device),
    }


def clean_environment(folder: Path) -> Record:
    """:func:`environment` of the CPU, for figures to be written to ``folder``.

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
    """``<folder>/<device>/<name>``, written anew."""
    path = folder / record["device"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def file_for(environment: Record, folder: Path) -> Path:
    """``<folder>/<device>/<commit>[-dirty].jsonl``."""
    suffix = "-dirty" if environment["dirty"] else ""
    return folder / environment["device"] / f"{environment['commit'][:12]}{suffix}.jsonl"


def append(path: Path, record: Record) -> None:
    """Add one line and hand it to the system at once: an interrupted run keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def read(path: Path) -> list[Record]:
    """All lines of a file; a last line that was cut off is ignored.

    Raises
    ------
    ValueError
        Another line is no JSON, or has another schema; the message names file and line.
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
    """Case -> peers that have a line from the same tree, threads and instruction set."""
    same = ("commit", "dirty", "device", "threads", "instruction_set")
    done: dict[str, set[str]] = {}
    for record in records:
        if all(record[name] == environment[name] for name in same):
            done.setdefault(record["case"], set()).add(record["peer"])
    return done


def newest(records: Iterable[Record]) -> list[Record]:
    """The last measurement of each (case, peer); lines of older ones are dropped."""
    lines: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = (record["case"], record["peer"])
        if lines.get(key) and lines[key][0]["run"] != record["run"]:
            lines[key] = []
        lines.setdefault(key, []).append(record)
    return [record for group in lines.values() for record in group]
