"""The command line: info and demo, and how they fail."""

from __future__ import annotations

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
