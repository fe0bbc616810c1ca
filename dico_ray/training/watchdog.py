"""Ends a worker that hangs, after it has told where: a stuck collective would otherwise be waited out."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable


class Watchdog:
    """A thread that ends this process when `beat` was not called for so long, once `dump` has got all stacks."""

    def __init__(self, timeout_s: float, dump: Callable[[str], None]) -> None:
        self._timeout_s, self._dump = timeout_s, dump
        self._last = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 4)):
            silent = time.monotonic() - self._last
            if silent > self._timeout_s:
                try:
                    self._dump(f"no step was finished for {silent:.0f} s (train.hang_timeout_s)\n\n{stacks()}")
                finally:
                    os._exit(1)


def stacks() -> str:
    """Where every thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
