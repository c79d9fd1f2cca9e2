"""Progress lines on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

_SECONDS_BETWEEN = 5


class Progress:
    """Count from 1 to ``total``, and print every few seconds how far it is and the time left.

    ``note`` is printed beside the count.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.note = what, total, ""

    def __iter__(self) -> Iterator[int]:
        started = said = time.monotonic()
        for step in range(1, self.total + 1):
            yield step
            now = time.monotonic()
            if step == self.total or now - said > _SECONDS_BETWEEN:
                said = now
                left = (now - started) / step * (self.total - step)
                bar = f"{'#' * (20 * step // self.total):<20}"
                line = f"{self.what} [{bar}] {step}/{self.total}  {self.note}  {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
