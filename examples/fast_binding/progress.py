"""A progress line with the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator


class Progress:
    """Counts from 1 to ``total`` and shows how far it is; ``note`` is shown beside it.

    On a terminal one line is written again and again, elsewhere a line for every tenth.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.note = what, total, ""

    def __iter__(self) -> Iterator[int]:
        started = shown = time.monotonic()
        terminal = sys.stderr.isatty()
        tenth = max(1, self.total // 10)
        for step in range(1, self.total + 1):
            yield step
            now = time.monotonic()
            if step == self.total or (now - shown > 1 if terminal else step % tenth == 0):
                shown = now
                left = (now - started) / step * (self.total - step)
                line = f"{self.what}: {step}/{self.total}  {self.note}  {left:.0f} s left"
                print(
                    f"\r\033[K{line}" if terminal else line,
                    end="" if terminal else "\n",
                    file=sys.stderr,
                    flush=True,
                )
        if terminal:
            print(file=sys.stderr)
