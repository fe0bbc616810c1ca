"""One trial of a sweep, as Ray Tune runs it: the door `train` in an actor of its own, and what it came to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import tune

from dico_ray import train
from dico_ray.config import Config, UserError
from dico_ray.scaling import trials
from dico_ray.scaling.summary import Result, tail_mean
from dico_ray.scaling.trials import Trial
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.loop import DivergedError
from dico_ray.training.telemetry import read_metrics

RECORD = "trial.json"


@dataclass(frozen=True)
class Job:
    """A trial to be taken to a step. config, settings: plain values, as they travel and are kept in trial.json.

    checks: it is the winner's, trained to check what was found, and no part of that.
    """

    scale: str
    settings: dict[str, Any]
    config: dict[str, Any]
    metric: str
    tail: float
    checks: bool = False

    @classmethod
    def of(cls, trial: Trial, steps: int, metric: str, tail: float, checks: bool = False) -> Job:
        settings = {"train.lr": trial.lr, **dict(trial.others)}
        return cls(trial.scale, settings, trial.to(steps).model_dump(), metric, tail, checks)

    @classmethod
    def all(cls, config: Config, scale: str, metric: str) -> list[Job]:
        """The scale's trials that lie in the sweep's folder and are of its settings, at their full length."""
        found = []
        folder = Storage(config.run.folder).at("trials")
        for name in folder.folders():
            record = _record(folder.at(name))
            if record and record["scale"] == scale and not record["checks"]:
                trial = trials.make(config, scale, record["settings"])
                if trial.key == name:
                    found.append(cls.of(trial, trial.config.train.steps, metric, config.sweep.tail))
        return found

    @property
    def run(self) -> Storage:
        return Storage(f"{self.config['run']['storage']}/{self.config['run']['name']}")

    @property
    def steps(self) -> int:
        return self.config["train"]["steps"]

    def is_done(self) -> bool:
        """Whether it was trained that far, or diverged."""
        record = _record(self.run)
        return bool(record) and (record["diverged"] or record["steps"] >= self.steps)

    def value(self) -> float:
        """Of the metric over the last part of its steps; infinite if it diverged."""
        record = _record(self.run)
        if record and record["diverged"]:
            return float("inf")
        return tail_mean(_curve(self.run, self.metric), self.steps, self.tail)


def outcome(trial: Trial, steps: int | None, metric: str, tail: float) -> Result:
    """What a trial has come to, after `steps` steps or as far as it was trained."""
    run, full = Storage(trial.config.run.folder), trial.config.train.steps
    record = _record(run)
    assert record, f"trial {trial.key} has not run"
    reached = min(record["steps"], full if steps is None else steps)
    curve = _curve(run, metric)
    if record["diverged"]:
        return Result(trial, reached, float("inf"), curve[:0], True)
    return Result(trial, reached, tail_mean(curve, reached, tail), curve[curve[:, 0] <= full], reached >= full)


def _record(run: Storage) -> dict[str, Any] | None:
    return json.loads(run.read(RECORD)) if run.exists(RECORD) else None


def _curve(run: Storage, metric: str) -> np.ndarray:
    """(points, 2): step and metric, where it was logged."""
    return np.array([(m["step"], m[metric]) for m in read_metrics(run) if metric in m], float).reshape(-1, 2)


def run_trial(jobs: list[Job], point: dict[str, Any]) -> None:
    """Tune's function: the job of number point["index"]."""
    _run(jobs[point["index"]])


def run_point(config: dict[str, Any], scale: str, metric: str, point: dict[str, Any]) -> None:
    """Tune's function for a searcher: point is the settings that it suggests."""
    trial = trials.make(build(config), scale, point)
    _run(Job.of(trial, trial.config.train.steps, metric, trial.config.sweep.tail))


def _run(job: Job) -> None:
    """Trains, keeps what came of it, and reports it to Tune. A death of either actor is Tune's to retry."""
    # Outside of the trial's placement group, which would hold all that training starts, and has no room for it.
    actor_class: Any = ray.remote(num_cpus=0)(_Training)
    actor = actor_class.options(scheduling_strategy="DEFAULT", max_concurrency=2).remote()
    record = {"scale": job.scale, "settings": job.settings, "checks": job.checks, "steps": 0, "diverged": False}
    if not job.run.exists(RECORD):
        job.run.write(RECORD, json.dumps(record).encode())
    kind, text = ray.get(actor.run.remote(job.config))
    name = job.config["run"]["name"]
    if kind == "failed":
        tune.report({"trial": name, "failed": text, "value": float("inf")})
        return
    record |= {"steps": job.steps, "diverged": kind == "diverged"}
    job.run.write(RECORD, json.dumps(record).encode())
    tune.report({"trial": name, "value": job.value(), "steps": job.steps})


class _Training:
    """Runs the door `train`. With several threads, so that it leaves the process's signals alone: Ray ends it."""

    def run(self, config: dict[str, Any]) -> tuple[str, str]:
        """How training ended: 'done', 'diverged', or 'failed' with the reason, which no repetition would change."""
        try:
            train.main(build(config))
        except train.TrainingFailedError as error:
            diverged = error.__cause__ and isinstance(train.cause_of(error.__cause__), DivergedError)
            return ("diverged" if diverged else "failed"), str(error)
        except UserError as error:
            return "failed", str(error)
        return "done", ""
