"""Where a step's time goes, measured on the device without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Phases:
    """`with phases("forward"): ...`, any number of times; `flush()` adds up.

    On a GPU the seconds are the device's own, between events that lie in its queue; elsewhere the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._spare: list[Any] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event: Any = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last flush. Waits for the device; asked for when metrics are logged."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            spans[-1][2].synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in spans:
            took = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + took
            if self._on_gpu:
                self._spare += [start, end]
        return seconds
