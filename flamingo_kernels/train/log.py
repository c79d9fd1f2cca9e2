"""Log of a run: JSON lines, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from flamingo_kernels.fields import is_integer

LOG_FILE = "log.jsonl"
_BAR = 20  # characters


class RunLog:
    """Append to ``log.jsonl``, and show progress on stderr.

    On a terminal it draws a progress bar; elsewhere it prints a line for every line of the log.

    Parameters
    ----------
    output : Path
        Folder of the log. Lines that it has after ``step``, from a run that died, are removed.
    step : int
        Updates done so far.
    total : int
        Updates of the whole run.
    """

    def __init__(self, output: Path, step: int, total: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.total = total
        self._first, self._started = step, time.monotonic()
        self._figures = ""
        path = output / LOG_FILE
        kept = [line for line in _lines(path) if _step_of(line) <= step]
        temporary = output / f".{LOG_FILE}.incomplete"
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._tensorboard = _tensorboard(output, step)

    def write(self, values: dict[str, Any]) -> None:
        """Write a line; the numbers in it, nested ones too, become scalars of TensorBoard."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in _scalars("", values):
                self._tensorboard.add_scalar(name, value, values["step"])
        self._figures = _figures(values)
        if sys.stderr.isatty():
            self.show(values["step"])
        else:
            print(f"step {values['step']}/{self.total}  {self._figures}", file=sys.stderr)

    def show(self, step: int) -> None:
        """Move the bar to ``step``, with the figures of the last line; only on a terminal."""
        if not sys.stderr.isatty():
            return
        filled = _BAR * step // self.total
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {step}/{self.total}"
        if done := step - self._first:
            seconds = (time.monotonic() - self._started) / done * (self.total - step)
            line += f"  {timedelta(seconds=round(seconds))} left"
        line = f"{line}  {self._figures}"[: shutil.get_terminal_size().columns - 1]
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line, and close the files."""
        if sys.stderr.isatty():
            print(file=sys.stderr)
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _figures(values: dict[str, Any]) -> str:
    losses = "  ".join(f"{name} {loss:.4f}" for name, loss in values["losses"].items())
    gates = values["gates"].values()
    text = (
        f"loss {values['loss']:.4f} ({losses})  {values['tokens_per_second']:.0f} tokens/s  "
        f"gates {min(gates):.3f} to {max(gates):.3f}"
    )
    if skipped := sum(values["skipped"].values()):
        text += f"  {skipped} skipped"
    return text


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that was cut off or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    return step if is_integer(step) else math.inf


def _scalars(prefix: str, values: dict[str, Any]) -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(f"{prefix}{name}/", value)
        elif isinstance(value, (int, float)) and f"{prefix}{name}" != "step":
            found.append((f"{prefix}{name}", value))
    return found


def _tensorboard(output: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
