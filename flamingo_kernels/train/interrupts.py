"""Signals that ask a run to end: Ctrl-C, and what Slurm and Kubernetes send."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within this context, the first signal calls ``stop``; the next one has its usual effect.

    Outside of the main thread, where Python takes no handlers, signals keep their effect.

    Parameters
    ----------
    stop : callable
        Called from the handler, between two instructions of the main thread.

    Attributes
    ----------
    exit_status : int
        0, or 128 plus the number of the signal.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self.stop = stop
        self.exit_status = 0
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if os.getpid() == self._process:
            self.exit_status = 128 + number
            self.stop()
        elif number != signal.SIGINT:  # in a worker that was forked in here; Ctrl-C reaches all
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
