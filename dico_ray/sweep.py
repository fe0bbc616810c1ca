"""The door `sweep`: learning rates x scales -> Ray Tune around the door `train` -> the best run, a scaling report.

A trial is a run of `train` in the sweep's folder, named by its settings. What it came to is read from there, so the
same command continues a sweep: finished trials are not trained again, others go on from their checkpoints. Successive
halving is a round of trials a stage, each taken on from its checkpoint: Tune's own schedulers compare all trials with
each other, and would end a small model for being small.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import yaml
from ray import tune

from dico_ray import cluster, ingest, train
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.shards import Manifest
from dico_ray.scaling import figures, page, summary, trials
from dico_ray.scaling.summary import Found, Result, ScaleFound
from dico_ray.scaling.trials import Trial
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.sweep_trial import Job, outcome, run_point, run_trial

SWEEP, BEST, REPORT, PICTURE = "sweep.json", "best.yaml", "sweep.html", "sweep.png"
_TUNE = "tune"  # Tune's own files, of no use afterwards
# A trial is some ten small processes: on few cores Ray would warn of their number, again and again.
_MANY_PROCESSES = ("RAY_worker_maximum_startup_concurrency", "16")
_QUIET_TUNE = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}  # no logs and tables of its own


class SweepFailedError(UserError):
    """A trial could not be trained: says which and why."""


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray sweep`: runs or continues the sweep (run.storage, run.name), and writes what it found into its folder.

    Raises ConfigError before anything starts for settings that cannot work, SweepFailedError if a trial failed, and
    KeyboardInterrupt if Ctrl-C ended it.
    """
    metric = metric_of(config)
    trials.check_space(config)
    manifest = Manifest.load(Storage(config.data.latents))
    first = {scale: trials.planned(config, scale) for scale in config.sweep.scales}
    for some in first.values():
        train.check_fits(some[0].config, manifest)
    if config.sweep.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "sweep.search: optuna is not installed; pip install 'dico-ray[sweep]', or take grid or random"
        )
    if not verbose:
        os.environ.setdefault(*_MANY_PROCESSES)
    cluster.connect(verbose)
    runner = _Runner(config, metric, cluster.uses_gpu(config.resources))
    for some in first.values():
        runner.at_once(some[0].config)
    found, verified = runner.sweep(first)
    print("\n".join(summary.table(found)))
    if verified:
        expected = found.winner.expected[1]
        print(
            f"verified: trained there it comes to {verified.value:.4f} ({100 * (expected / verified.value - 1):+.2f}%)"
        )
    _write(found, verified)


def metric_of(config: Config) -> str:
    """What is minimised. Raises ConfigError if training with this config does not log it."""
    validates = config.train.validate_every is not None
    logged = ["loss", "mse", "vb", *(["val_loss"] if validates else [])]
    metric = config.sweep.metric or logged[-1 if validates else 0]
    if metric not in logged:
        hint = "" if validates or metric != "val_loss" else "; val_loss needs train.validate_every"
        raise ConfigError(f"sweep.metric: nothing reports {metric!r}; take {' or '.join(logged)}{hint}")
    return metric


def bundles(config: Config, gpu: bool) -> list[dict[str, float]]:
    """What one trial takes of the cluster: each worker's share, and its reading task's."""
    worker = {"GPU": 0.0, **cluster.worker_bundle(config.resources, gpu)}
    return [worker] * config.train.world_sizes[0] + [{"CPU": ingest.READ_TASK_CPUS, "GPU": 0.0}]


def _of_a_card(share: float) -> float:
    """What a share of a GPU takes of it, since what is left over is of no use to another such share."""
    return 1 / int(1 / share + 1e-6) if 0 < share < 1 else share


def at_once(bundles: list[dict[str, float]], nodes: Iterable[dict[str, float]]) -> int:
    """How many trials the nodes hold at the same time, all their parts in place: no two can wait for each other.

    Parts are placed one by one, on the first node with room. A share of a GPU is one card's: of a card, 0.4 is there
    twice.
    """
    bundles = [{**bundle, "GPU": _of_a_card(bundle.get("GPU", 0.0))} for bundle in bundles]
    free = [dict(node) for node in nodes]
    count = 0
    while True:
        for bundle in bundles:
            node = next((n for n in free if all(n.get(k, 0.0) + 1e-6 >= v for k, v in bundle.items())), None)
            if node is None:
                return count
            for kind, amount in bundle.items():
                node[kind] = node.get(kind, 0.0) - amount
        count += 1


@dataclass
class _Runner:
    """Runs rounds of trials, and reads from their folders what they came to."""

    config: Config
    metric: str
    gpu: bool

    def sweep(self, first: dict[str, list[Trial]]) -> tuple[Found, Result | None]:
        """first: each scale's trials to begin with. Returns what was found, and the winner as it was trained."""
        if self._searches:
            known = [self._searched(scale) for scale in first]
        else:
            known = self._halved([kind for some in first.values() for kind in trials.by_kind(self.config, some)])
        for _ in range(self.config.sweep.widen):
            more = [self._beyond(some) for some in known]
            if not any(more):
                break
            self._run([(trial, trial.config.train.steps) for trial in more if trial])
            known = [[*some, trial] if trial else some for some, trial in zip(known, more, strict=True)]
        found = summary.found(self.config, self.metric, [self._scale(some) for some in known])
        self._tell_edges(found)
        return found, self._verified(found) if self.config.sweep.verify else None

    @property
    def _searches(self) -> bool:
        return self.config.sweep.search == "optuna"

    def at_once(self, config: Config) -> int:
        """Trials of this config that run at the same time. Raises ConfigError if the cluster cannot hold one."""
        need = bundles(config, self.gpu)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = at_once(need, nodes)
        if not count:
            cpus, gpus = (sum(b[kind] for b in need) for kind in ("CPU", "GPU"))
            have = ray.cluster_resources()
            raise ConfigError(
                f"sweep.scales: {config.sweep.scales[0]} cannot fit: {config.train.num_workers} workers and a reading "
                f"task take {cpus:g} CPUs and {gpus:g} GPUs, and the Ray cluster has {have.get('CPU', 0):g} and "
                f"{have.get('GPU', 0):g}; lower train.num_workers or resources.worker_cpus, or add nodes"
            )
        return count

    def _halved(self, first: list[list[Trial]]) -> list[list[Trial]]:
        """Stage by stage; after each, the worse part of each list of trials (a scale's) is left where it is."""
        alive = list(first)
        for rung in range(self.config.sweep.rungs):
            self._run([(t, trials.rung_steps(t.config)[rung]) for some in alive for t in some])
            if rung + 1 < self.config.sweep.rungs:
                for i, some in ((i, some) for i, some in enumerate(alive) if some):
                    steps = trials.rung_steps(some[0].config)[rung]
                    values = {t.key: outcome(t, steps, self.metric, self.config.sweep.tail).value for t in some}
                    alive[i] = trials.survivors(some, values, self.config.sweep.eta)
                    title = trials.title(self.config, some[0])
                    print(f"sweep: {title}: {len(alive[i])} of {len(some)} trials go on from step {steps}")
        return first

    def _scale(self, some: list[Trial]) -> ScaleFound:
        """Raises SweepFailedError if no trial of the scale can be told a loss."""
        tail = self.config.sweep.tail
        results = [outcome(trial, None, self.metric, tail) for trial in some]
        if not any(r.complete and np.isfinite(r.value) for r in results):
            raise SweepFailedError(f"all trials of {trials.title(self.config, some[0])} diverged; lower sweep.lr")
        return summary.scale_found(results, self.config.run.seed)

    def _beyond(self, some: list[Trial]) -> Trial | None:
        """The trial that widens a scale's range, if its best one lies at an end of it."""
        results = [outcome(trial, None, self.metric, self.config.sweep.tail) for trial in some]
        values = {r.trial.key: r.value for r in results if r.complete}
        trial = trials.widened(self.config, some, values)
        if trial:
            best = min((r for r in results if r.complete), key=lambda r: r.value)
            end = "largest" if trial.lr > best.trial.lr else "smallest"
            title = trials.title(self.config, trial)
            print(f"sweep: {title}: its best learning rate {best.trial.lr:g} is the {end} tried; trying {trial.lr:g}")
        return trial

    def _tell_edges(self, found: Found) -> None:
        for scale in (scale for kind in found.every for scale in kind.scales):
            rates = [r.trial.lr for r in scale.results]
            if scale.best.trial.lr in (min(rates), max(rates)):
                title = trials.title(self.config, scale.best.trial)
                print(
                    f"sweep: {title}: the best learning rate {scale.best.trial.lr:g} is still at an end of what "
                    f"was tried, after sweep.widen = {self.config.sweep.widen} steps beyond it; move sweep.lr"
                )

    def _verified(self, found: Found) -> Result | None:
        """The winner, trained at the fitted learning rate; None if nothing was fitted (its best trial is trained)."""
        if not found.winner.trusted:
            return None
        others = dict(found.winner.best.trial.others)
        rate = trials.rounded(found.winner.expected[0])
        trial = trials.make(self.config, found.winner.scale, {"train.lr": rate, **others})
        print(f"sweep: checking the winner: {trial.scale} at learning rate {rate:g}")
        job = Job.of(trial, trial.config.train.steps, self.metric, self.config.sweep.tail, checks=True)
        self._run_jobs([job])
        return outcome(trial, None, self.metric, self.config.sweep.tail)

    def _run(self, wanted: list[tuple[Trial, int]]) -> None:
        """Takes each trial to its step. Trials that need as much as each other share the cluster; the largest first."""
        self._run_jobs([Job.of(trial, steps, self.metric, self.config.sweep.tail) for trial, steps in wanted])

    def _run_jobs(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.is_done()]
        by_workers: dict[int, list[Job]] = {}
        for job in jobs:
            by_workers.setdefault(build(job.config).train.world_sizes[0], []).append(job)
        for workers in sorted(by_workers, reverse=True):
            some = by_workers[workers]
            space = {"index": tune.grid_search(list(range(len(some))))}
            ended = self._tune(partial(run_trial, some), space, build(some[0].config), len(some))
            self._check(ended, all(job.is_done() for job in some))

    def _searched(self, scale: str) -> list[Trial]:
        """A scale's trials as Optuna suggests them, one after another; it is told of those that there are already."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        low, high = self.config.sweep.lr
        space: dict[str, Any] = {"train.lr": tune.loguniform(low, high)}
        space |= {path: _domain(values) for path, values in self.config.sweep.space.items()}
        begun = Job.all(self.config, scale, self.metric)
        self._run_jobs(begun)  # those that an earlier command left unfinished
        done = [j for j in begun if low <= j.settings["train.lr"] <= high and set(j.settings) == set(space)]
        left = self.config.sweep.points - len(done)
        if left > 0:
            known = {"points_to_evaluate": [j.settings for j in done], "evaluated_rewards": [j.value() for j in done]}
            search = OptunaSearch(
                OptunaSearch.convert_search_space(space), metric="value", mode="min",
                seed=self.config.run.seed + len(done), **(known if done else {}),
            )  # fmt: skip
            point = partial(run_point, self.config.model_dump(), scale, self.metric)
            ended = self._tune(point, {}, trials.planned(self.config, scale)[0].config, left, search)
            begun = Job.all(self.config, scale, self.metric)
            self._check(ended, sum(job.is_done() for job in begun) >= len(done) + left)
        return [trials.make(self.config, scale, job.settings) for job in begun]

    def _tune(self, trainable: Any, space: dict[str, Any], config: Config, count: int, search: Any = None) -> Any:
        """Runs trials through Tune, as many at once as the cluster holds. Tune's own actors take a byte of it."""
        for name, value in _QUIET_TUNE.items():
            os.environ.setdefault(name, value)
        folder, most = Storage(self.config.run.folder), self.at_once(config)
        print(
            f"sweep: {count} trials on {config.train.num_workers} worker(s) each, {min(most, count)} at a time",
            flush=True,
        )
        folder.remove(_TUNE)
        fs, path = folder.for_arrow()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"memory": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                max_concurrent_trials=most, num_samples=count if search else 1, search_alg=search
            ),
            run_config=tune.RunConfig(
                name=_TUNE, storage_path=path, storage_filesystem=fs, verbose=0, callbacks=[_Tell(self.metric, count)],
                failure_config=tune.FailureConfig(max_failures=self.config.sweep.max_failures),
            ),
        )  # fmt: skip
        try:
            return tuner.fit()
        finally:
            folder.remove(_TUNE)

    def _check(self, ended: Any, complete: bool) -> None:
        """Raises what kept trials from their end: their own reason, deaths, or Ctrl-C, after which Tune returns too."""
        for result in ended:
            if result.metrics and result.metrics.get("failed"):
                raise SweepFailedError(f"trial {result.metrics['trial']}: {result.metrics['failed']}")
        if ended.errors:
            last = str(ended.errors[0]).strip().splitlines()[-1]
            raise SweepFailedError(
                f"a trial died {self.config.sweep.max_failures + 1} times (sweep.max_failures + 1), last: {last}; "
                "the same command continues it"
            )
        if not complete:
            raise KeyboardInterrupt


class _Tell(tune.Callback):
    """A line for each trial that ends."""

    def __init__(self, metric: str, count: int) -> None:
        self._metric, self._count, self._ended = metric, count, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = trial.last_result or {}
        self._ended += 1
        if "steps" in told:
            value = f"{self._metric} {told['value']:.4f}" if np.isfinite(told["value"]) else "diverged"
            step = f"step {told['steps']}"
            print(f"sweep: {self._ended}/{self._count} {told['trial']}: {value} at {step}", flush=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"sweep: the process of a trial died; it continues at its checkpoint (failure {trial.num_failures})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        print(f"sweep: the process of a trial died; it is given up (failure {trial.num_failures})")


def _domain(values: Any) -> Any:
    if isinstance(values, dict):
        return (tune.loguniform if values.get("log") else tune.uniform)(values["low"], values["high"])
    return tune.choice(values)


def _write(found: Found, verified: Result | None) -> None:
    """best.yaml, sweep.json, the HTML report and its picture, into the sweep's folder."""
    folder = Storage(found.config.run.folder)
    rate = trials.rounded(found.winner.expected[0])
    best = trials.make(
        found.config, found.winner.scale, {"train.lr": rate, **dict(found.winner.best.trial.others)}
    ).config.model_dump(mode="json")
    del best["sweep"]
    best["run"] |= {"storage": found.config.run.storage, "name": f"{found.config.run.name}-best"}
    folder.write(BEST, yaml.safe_dump(best, sort_keys=False).encode())
    folder.write(SWEEP, json.dumps(summary.as_json(found, verified), indent=1).encode())
    folder.write(PICTURE, figures.png(found, verified))
    folder.write(REPORT, page.render(found, verified).encode())
    print(f"sweep: {folder.path(REPORT)}\nsweep: dico-ray train --config {folder.path(BEST)}")
