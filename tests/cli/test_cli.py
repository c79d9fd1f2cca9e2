"""The command line: info and demo, and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flamingo_kernels.cli import main
from flamingo_kernels.ops import dispatch


def test_info_lists_every_op_and_kernel(capsys) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in dispatch.OPS:
        for kernel in dispatch.KERNELS:
            assert any(line.split()[:2] == [op, kernel] for line in lines)


def test_info_of_a_config(capsys) -> None:
    assert main(["info", "--config", "tiny"]) == 0
    assert "gated_cross_attn_layers" in capsys.readouterr().out


BARE = """
import sys
optional = ["PIL", "yaml", "transformers", "tokenizers", "matplotlib", "tensorboard", "sklearn"]
sys.modules |= dict.fromkeys(optional)  # None: an import of it is an ImportError
from flamingo_kernels.cli import COMMANDS, main

for command in ([], *([name] for name in COMMANDS)):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert main(["info"]) == main(["info", "--config", "tiny"]) == 0
assert main(["plan", "--config", "tiny", "--gpus", "1", "--memory", "1"]) == 0
assert main(["generate", "--text", "kip", "--max-new-tokens", "2"]) == 0
for arguments in (["generate", "--image", "a.png", "--text", "x"], ["demo"], ["train", "a.yaml"]):
    assert main(arguments) == 1
"""


def test_commands_without_what_is_optional(tmp_path: Path) -> None:
    """What needs a missing package names the extra to install, in one line."""
    run = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for command, extra in (("generate", "hf"), ("demo", "demo"), ("train", "train")):
        (line,) = (
            x for x in run.stderr.splitlines() if x.startswith(f"flamingo-kernels {command}")
        )
        assert f'pip install "flamingo_kernels[{extra}]"' in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--config", "huge"], "unknown config 'huge'; known: tiny"),
        (["demo", "--kernel", "fast"], "unknown kernel 'fast'"),
        (["demo", "--shots", "99"], "--shots must be in 1..32, got 99"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_demo(tmp_path: Path, capsys) -> None:
    assert main(["demo", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "<BOS><image>kip<EOC><image>zov<EOC><image>" in out
    assert out.count(": agrees") == 3 and "DISAGREES" not in out
    ours, reference, right = (
        line.split()[1:9] for line in out.partition("== Names")[2].splitlines()[1:4]
    )
    assert ours == reference and right == ["kip", "zov"] * 4
    assert sum(a == b for a, b in zip(ours, right, strict=True)) > len(right) // 2
    assert (tmp_path / "names.png").stat().st_size > 10_000
