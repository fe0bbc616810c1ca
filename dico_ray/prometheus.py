"""Numbers for Prometheus, through the agent on each Ray node: what they are called, and that they stay there.

Every metric carries the label `run`. Ray adds the node and the job. cluster/prometheus/ has the rules over them and
cluster/grafana/ the pictures.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from dico_ray import progress

_AGAIN_S = 1.0  # Ray's agent forgets a gauge that nobody has set for two of its intervals (10 s each, if unchanged)
PREFIX = "dico_ray_"


class Gauges:
    """Numbers of this process under ray_dico_ray_NAME (Ray puts ray_ before all), set again every second until `close`.

    labels: of all of them. live: numbers that change by themselves, such as ages; asked for each time.
    """

    def __init__(self, labels: Mapping[str, str], live: Callable[[], Mapping[str, float]] = dict) -> None:
        self._labels, self._live = dict(labels), live
        self._numbers: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._again, daemon=True, name="prometheus").start()

    def set(self, numbers: Mapping[str, Any]) -> None:
        """What is no finite number is left out: Ray does not export it."""
        with self._lock:
            self._numbers |= {k: float(v) for k, v in numbers.items() if isinstance(v, int | float) and k != "time"}
            self._export()

    def add(self, name: str, amount: float = 1.0) -> None:
        """A gauge that counts from 0, so that its first event is a change too."""
        with self._lock:
            self._numbers[name] = self._numbers.get(name, 0.0) + amount
            self._export()

    def close(self) -> None:
        self._over.set()

    def _again(self) -> None:
        while not self._over.wait(_AGAIN_S):
            with self._lock:
                self._export()

    def _export(self) -> None:
        if not ray.is_initialized():
            return
        for name, value in {**self._numbers, **self._live()}.items():
            if math.isfinite(value):
                if name not in self._gauges:
                    self._gauges[name] = Gauge(PREFIX + name, name.replace("_", " "), tuple(self._labels))
                self._gauges[name].set(value, self._labels)


_counters: dict[str, Counter] = {}


def count(name: str, amount: float, run: str) -> None:
    """Adds to the counter ray_dico_ray_NAME_total of this process: Ray's agent adds up what processes counted."""
    if name not in _counters:
        _counters[name] = Counter(f"{PREFIX}{name}", name.replace("_", " "), ("run",))
    if amount > 0:
        _counters[name].inc(amount, {"run": run})


_work: dict[str, Gauges] = {}


def export_progress(run: str) -> None:
    """From now on every progress line of this process is exported too, as ray_dico_ray_work_* with the label `verb`."""

    def note(what: str, done: int, total: int, rate: float) -> None:
        if what not in _work:
            _work[what] = Gauges({"run": run, "verb": what})
        _work[what].set({"work_done": done, "work_total": total, "work_per_s": rate})

    progress.observers[:] = [note]
