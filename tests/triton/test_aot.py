"""Ahead-of-time compilation of a subset; ``python -m flamingo_kernels.tools.aot`` does it all.

Compiling needs a process in which Triton is not interpreted, so each test starts one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def compiled(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "flamingo_kernels.tools.aot", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "only"),
    [
        ("sm_90", r"bf16 D(64|128) R64 media_(forward|backward)"),
        ("sm_90", r"bf16 (D64 latent|C4096 (gated_residual|layer_norm))"),
        ("gfx942", r"bf16 D64 R64 media_(forward|backward)"),
    ],
)
def test_configs_compile_within_limits(architecture: str, only: str, tmp_path: Path) -> None:
    """No spill, shared memory within the limit, tensor-core instructions."""
    output = tmp_path / "table.md"
    done = compiled("--arch", architecture, "--only", only, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in output.read_text().splitlines() if f"| {architecture} |" in line]
    assert len(table) >= 3 and "0 failed" in done.stdout


def test_the_committed_table_is_current() -> None:
    """It lists exactly what would be compiled; ``make aot`` writes it anew."""
    done = compiled("--list")
    assert done.returncode == 0, done.stderr
    wanted = done.stdout.splitlines()
    lines = (ROOT / "benchmarks" / "results" / "aot.md").read_text().splitlines()
    rows = [line for line in lines if any(f"| {a} |" in line for a in ARCHITECTURES)]
    assert [row[: len(columns)] for row, columns in zip(rows, wanted, strict=True)] == wanted
    spills = [row.split("|")[8].strip() for row in rows]
    assert set(spills) == {"0"}


def test_interpreted_kernels_are_refused() -> None:
    done = compiled(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


def test_problems_are_named() -> None:
    """A spill, too much shared memory and a missing tensor-core instruction each fail."""
    code = (
        "from flamingo_kernels.tools.aot import Result;"
        "print(Result('k', 'gfx942', 4, 64, 8, 70000, False).problems())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = ["spills (8)", "70000 bytes of shared memory, the limit is 65536"]
    assert eval(done.stdout) == [*expected, "no tensor-core instruction"]
