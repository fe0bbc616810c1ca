"""The actor beside the driver that keeps a run's numbers and events, wherever rank 0 happens to live."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dico_ray import ingest
from dico_ray.config import Config, UserError
from dico_ray.prometheus import Gauges
from dico_ray.storage import Storage
from dico_ray.training.telemetry import EventLog, MetricsLog
from dico_ray.training.track import Tracker, open_tracker

# Events that are counted, and as what; a restart of the command counts anew.
_COUNTED = {
    "failure": "failures", "checkpoint": "checkpoints", "checkpoint failed": "failed_checkpoints",
    "passed over": "passed_over_steps", "hang": "hangs",
}  # fmt: skip


def start(config: Config) -> Any:
    """Raises ConfigError if a tracking service cannot be had."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # One thread writes, in the order of the calls: an actor with max_concurrency > 1 would run them in any order.
    remote: Any = ray.remote  # its annotations do not know concurrency groups
    actor = remote(concurrency_groups={"writing": 1, "answering": 3})(Recorder)
    recorder = actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=1).remote(config)
    try:
        ray.get(recorder.latest.remote())
    except (RayTaskError, RayActorError) as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, UserError) else error) from None
    return recorder


class Goodput:
    """Share of the time since the command began that went into steps that stand, and where the rest went."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spans: list[tuple[int, float]] = []  # (last step, seconds) of each logged stretch
        self._redone = self._stalled = self._waited = self._validated = 0.0
        self._step = 0

    def begin(self, start: int) -> None:
        """Workers begin (again) after `start` steps: what was done beyond is lost."""
        self._redone += sum(seconds for step, seconds in self._spans if step > start)
        self._spans = [span for span in self._spans if span[0] <= start]
        self._step = start

    def add(self, metrics: dict[str, Any]) -> dict[str, float]:
        seconds = metrics["step_s"] * (metrics["step"] - self._step)
        self._step = metrics["step"]
        stalled, waited = metrics["checkpoint_stall_s"], metrics["data_wait"] * seconds
        self._stalled += stalled
        self._waited += waited
        self._validated += metrics.get("validation_s", 0.0)
        self._spans.append((self._step, seconds - stalled - waited))
        wall, useful = time.monotonic() - self._began, sum(s for _, s in self._spans)
        known = useful + self._redone + self._stalled + self._waited + self._validated
        return {
            "goodput": useful / wall, "lost_starting_s": max(0.0, wall - known), "lost_redone_s": self._redone,
            "lost_stalled_s": self._stalled, "lost_waiting_s": self._waited,
            **({"lost_validating_s": self._validated} if self._validated else {}),
        }  # fmt: skip


class Recorder:
    """Metrics to metrics.jsonl, TensorBoard, Prometheus (through Ray's agent) and trackers; events to events.jsonl."""

    def __init__(self, config: Config) -> None:
        self._config, self._run = config, Storage(config.run.folder)
        self._events = EventLog(self._run)
        self._log: MetricsLog | None = None
        about = config.model_dump(mode="json")
        self._trackers: list[Tracker] = [
            open_tracker(service, self._run.url, config.run.name, about) for service in config.run.track
        ]
        self._latest: dict[str, Any] = {}
        self._stop = self._attempt = ""
        self._goodput = Goodput()
        self._logged = self._committed = time.monotonic()
        self._gauges = Gauges({"run": config.run.name}, self._ages)
        self._gauges.set(dict.fromkeys(_COUNTED.values(), 0) | {"total_steps": config.train.steps})
        self._recent: list[dict[str, Any]] = []

    @ray.method(concurrency_group="writing")
    def begin(
        self, start: int, attempt: str, workers: int, unlogged: list[dict[str, Any]], took: dict[str, float]
    ) -> None:
        """Workers begin (again) after `start` steps.

        unlogged: metrics up to there that may not have been logged. took: seconds of what rank 0 did first, by name.
        """
        if self._log:
            self._log.close()
        self._log = MetricsLog(self._run, start, unlogged)
        self._goodput.begin(start)
        self._attempt = attempt
        self._latest = {}
        self._logged = time.monotonic()
        # No step's time is known yet: the alert's ten times that are what a worker may take before it counts as hung.
        due = self._config.train.hang_timeout_s / 10
        self._gauges.set({"step": start, "workers": workers, "skipped_steps": 0, "log_due_s": due})
        self._stop = "" if self._stop == RESTART else self._stop
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items())
        self._add({"event": "start", "step": start, "attempt": attempt, "workers": workers, "seconds": took,
                   "text": f"{workers} workers begin after step {start} ({parts})"})  # fmt: skip

    @ray.method(concurrency_group="writing")
    def log(self, metrics: dict[str, Any]) -> None:
        """metrics: plain numbers by name; `step` among them."""
        assert self._log
        metrics = {**metrics, **self._goodput.add(metrics), "object_store_mb": ingest.object_store_use()[0] / 1e6}
        metrics["time"] = time.time()
        self._latest = metrics
        for log in (self._log, *self._trackers):
            log.log(metrics)
        self._logged, train = time.monotonic(), self._config.train
        due = {"log_due_s": train.log_every, "checkpoint_due_s": train.checkpoint_every}
        self._gauges.set({**metrics, **{name: steps * metrics["step_s"] for name, steps in due.items()}})

    @ray.method(concurrency_group="writing")
    def evaluated(self, metrics: dict[str, Any]) -> None:
        """An evaluation's numbers, with the `step` of its checkpoint, which training has left behind."""
        self._log = self._log or MetricsLog(self._run, self._config.train.steps)  # none: training was over before
        for log in (self._log, *self._trackers):
            log.log({**metrics, "time": time.time()})
        self._gauges.set({"evaluation_step" if name == "step" else name: value for name, value in metrics.items()})

    def _ages(self) -> dict[str, float]:
        """Seconds since metrics were logged or workers began, and since a commit or the command began."""
        now = time.monotonic()
        return {"log_age_s": now - self._logged, "checkpoint_age_s": now - self._committed}

    @ray.method(concurrency_group="writing")
    def event(self, event: dict[str, Any]) -> None:
        """event: its kind under 'event', a line for people under 'text', and facts."""
        self._add(event)

    def _add(self, event: dict[str, Any]) -> None:
        event = {"time": time.time(), **event}
        self._events.add(event)
        self._recent.append(event)
        if name := _COUNTED.get(event["event"]):
            self._gauges.add(name, len(event["steps"]) if "steps" in event else 1)
        if event["event"] == "checkpoint":
            self._committed = time.monotonic()
            self._gauges.set({f"checkpoint_{name}": event[name] for name in ("step", "seconds", "bytes")})

    @ray.method(concurrency_group="answering")
    def latest(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The last logged metrics, and the events since the last call."""
        recent, self._recent = self._recent, []
        return self._latest, recent

    @ray.method(concurrency_group="answering")
    def begun(self) -> str:
        """The attempt whose workers began last; '' before the first."""
        return self._attempt

    @ray.method(concurrency_group="answering")
    def want_stop(self, reason: str) -> None:
        """Asks the workers to save a checkpoint and end. RESTART: to be started again at once."""
        self._stop = self._stop or reason

    @ray.method(concurrency_group="answering")
    def stop_wanted(self) -> str:
        return self._stop

    @ray.method(concurrency_group="writing")
    def close(self) -> None:
        for log in (self._log, *self._trackers):
            if log:
                log.close()
        self._gauges.close()


RESTART = "restart"
