"""The commit, machine and versions that a figure was measured on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import flamingo_kernels

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


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else ""


def revision() -> tuple[str, str]:
    """Return (commit, digest of the changes to it) of the tree that holds ``flamingo_kernels``.

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
    """Return the model of the processor or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.machine()


def device_slug(device: str) -> str:
    """Return a folder name such as ``cpu-amd-epyc-2c-avx2`` or ``cuda-nvidia-h200``."""
    name = device_name(device)
    if device == "cpu":  # processors of one name may have other instructions
        name += f" {len(os.sched_getaffinity(0))}c {torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {name}".lower()).strip("-")


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


def environment(device: str) -> dict[str, Any]:
    """Return what every record of a run has in common: tree, machine, versions."""
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
