"""The progress line: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_PLAIN_EVERY_S = 15.0

observers: list[Callable[[str, int, int, float], None]] = []
"""Called at every update with what is done, how much of it, the total and the rate in units/s."""


class Progress:
    """`with Progress("train", total, "steps") as progress: progress.update(done, "loss 0.31")`.

    done is absolute; the rate counts what was done since the start, so a resumed run shows its real one.
    """

    def __init__(self, what: str, total: int, unit: str, already: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = already
        self._began = self._printed = time.monotonic()
        self._console = Console()
        columns = (
            TextColumn("{task.description:8}"), BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=already, text="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, done: int, text: str = "") -> None:
        """Shows `done` of the total, the rate so far, and what the caller adds."""
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._began, 1e-9)
        line = f"{rate:.1f} {self._unit}/s {text}".rstrip()
        self._bar.update(self._task, completed=done, text=line)
        for observe in observers:
            observe(self._what, done, self._total, rate)
        finished = self._done < self._total <= done
        self._done = done
        if not self._console.is_terminal and (finished or now - self._printed >= _PLAIN_EVERY_S):
            self._printed = now
            left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 and done < self._total else ""
            print(f"{self._what}: {done}/{self._total} {self._unit}, {line}{left}", flush=True)

    def note(self, text: str) -> None:
        """A line of its own above the bar."""
        if self._console.is_terminal:
            self._bar.console.print(f"{self._what}: {text}", markup=False, highlight=False)
        else:
            print(f"{self._what}: {text}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
