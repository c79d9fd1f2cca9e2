"""The log of a run: JSON lines that survive a kill, and TensorBoard's scalars."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from flamingo_kernels.train import log as log_module
from flamingo_kernels.train.log import LOG_FILE, RunLog

FIGURES = "loss 2.0000 (pages 1.5000)  9 tokens/s  gates -0.250 to 0.500  3 skipped"


def line(step: int) -> dict:
    return {
        "step": step,
        "loss": 2.0,
        "losses": {"pages": 1.5},
        "tokens_per_second": 9.0,
        "gates": {"attn_gate.0": -0.25, "attn_gate.1": 0.5},
        "skipped": {"pages: broken image": 3},
    }


def test_lines_after_the_step_go_before_a_run_continues(tmp_path: Path, capsys) -> None:
    file = tmp_path / LOG_FILE
    lines = "".join(f"{json.dumps(line(step))}\n" for step in (1, 2, 3))
    file.write_bytes(b'\xff\0\n{"step": "1"}\n' + lines.encode() + b'{"step": 4, "l')
    log = RunLog(tmp_path, 2, 10)
    log.write(line(3))
    log.close()
    assert [json.loads(text) for text in file.read_text().splitlines()] == [
        line(1),
        line(2),
        line(3),
    ]
    progress = capsys.readouterr().err
    assert progress == f"step 3/10  {FIGURES}\n"


def test_on_a_terminal_there_is_a_bar(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    clock = iter((100.0, 104.0, 106.0, 108.0))
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    log = RunLog(tmp_path, 2, 10)
    log.show(3)
    log.write(line(4))
    monkeypatch.setenv("COLUMNS", "30")
    log.show(10)
    log.close()
    assert capsys.readouterr().err.split("\r\033[K") == [
        "",
        "[######..............] 3/10  0:00:28 left  ",
        f"[########............] 4/10  0:00:18 left  {FIGURES}",
        "[####################] 10/10 \n",
    ]


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path: Path, monkeypatch) -> None:
    written: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed",))

    stand_in = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    log = RunLog(tmp_path, 4, 10)
    log.write(line(5))
    log.close()
    assert written == [
        (str(tmp_path / "tensorboard"), 5),
        ("loss", 2.0, 5),
        ("losses/pages", 1.5, 5),
        ("tokens_per_second", 9.0, 5),
        ("gates/attn_gate.0", -0.25, 5),
        ("gates/attn_gate.1", 0.5, 5),
        ("skipped/pages: broken image", 3, 5),
        ("closed",),
    ]
