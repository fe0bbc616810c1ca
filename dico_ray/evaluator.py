"""Evaluations beside training: committed checkpoints are judged on what training leaves free of the cluster.

A thread beside the driver takes the newest checkpoint that is due (training/evaluations.py); older ones that still
wait then are skipped. The work is an actor's, and its pool's, in a placement group of their own: ending the group ends
them all. Training never waits for it, and is given its room back before workers start: an evaluation that is ended so
is done again later. What fails, is too slow or finds no room is told by an event, and that is all.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dico_ray import cluster, evaluate, ingest, measure, recorder, sample
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.settings import build, merge
from dico_ray.storage import Storage
from dico_ray.training import evaluations
from dico_ray.training.checkpoint import Checkpoint, Retention, retain
from dico_ray.training.evaluations import Evaluations
from dico_ray.training.telemetry import EVALUATED
from dico_ray.worker import CHECKPOINTS

_LOOK_S = 2.0
_ROOM_S = 10.0  # for a group that would fit a moment ago
_END_S = 30.0  # for an evaluation that was told to end


def check(config: Config) -> None:
    """Raises ConfigError if the reference or the autoencoder is not there: better now than after days of training."""
    reference, vae = config.evaluate.reference, config.codec.vae
    folder, _, name = reference.rstrip("/").rpartition("/")
    if reference and not Storage(folder).exists(name):
        raise ConfigError(f"evaluate.reference: {reference} is not there; name real images, or unset evaluate.every")
    if vae.startswith("/") and not Path(vae).is_dir():
        raise ConfigError(f"codec.vae: {vae} is not a folder; name the autoencoder, or unset evaluate.every")


def settings_beside(config: Config, checkpoint: Checkpoint) -> Config:
    """The settings by which a checkpoint is judged: those of `sample` and `evaluate`, on the pool set aside for it."""
    beside = config.evaluate
    place = config.resources.accelerator if beside.accelerator == "same" else beside.accelerator
    own = {
        "sample": {"checkpoint": checkpoint.storage.url, "weights": "ema", "count": beside.count},
        "evaluate": {"images": ""},
        "resources": {"actors": beside.actors, "accelerator": place},
    }
    return build(merge(config.model_dump(), own))


def draw_grid(config: Config, checkpoint: Checkpoint) -> bytes:
    """A PNG of evaluate.grid_rows rows, a column per class (ten at the most): by seed and index, as `sample` has it."""
    classes, rows = len(checkpoint.about["classes"]), config.evaluate.grid_rows
    config = build(merge(config.model_dump(), {"sample": {"count": classes * rows, "grid_rows": rows}}))
    gpu = cluster.uses_gpu(config.resources)
    actor = ray.remote(sample.SampleActor).options(**cluster.actor_options(config.resources, gpu))
    artist: Any = actor.remote(config, checkpoint, gpu)
    cells: dict[int, np.ndarray] = {}
    for start, stop in _runs(sample.grid_indices(config, classes), config.sample.batch_size):
        pixels, _ = ray.get(artist.generate.remote(start, stop))
        cells |= dict(zip(range(start, stop), pixels, strict=True))
    return sample.grid_picture(config, classes, cells)


def _runs(indices: list[int], most: int) -> list[tuple[int, int]]:
    """Ascending indices -> ranges (start, stop) of at most `most`, without a gap."""
    found: list[tuple[int, int]] = []
    for index in indices:
        start, stop = found[-1] if found else (0, -1)
        if index == stop and stop - start < most:
            found[-1] = (start, index + 1)
        else:
            found.append((index, index + 1))
    return found


class _Judge:
    """The actor that does one evaluation; what it starts lives in its placement group and ends with it."""

    def work(self, config: Config, folder: Storage) -> tuple[int, dict[str, Any] | None, bytes]:
        """(step, result or None without a reference, grid) of the checkpoint in `folder`."""
        cluster.quiet()
        checkpoint = Checkpoint.open(folder)
        beside = settings_beside(config, checkpoint)
        grid = draw_grid(beside, checkpoint)
        result = evaluate.score_checkpoint(beside, checkpoint) if config.evaluate.reference else None
        return checkpoint.step, result, grid


class _EndedError(Exception):
    """The evaluation was told to end; it stays due."""


class Evaluator:
    """`with` it around a training: what is due is done meanwhile, and at the end, by `finish`, waited for."""

    def __init__(self, config: Config, due: Evaluations, keeper: Any) -> None:
        """keeper: the recorder."""
        self._config, self._due, self._keeper = config, due, keeper
        self._checkpoints = Storage(config.run.folder).at(CHECKPOINTS)
        self._over, self._end, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._attempt: str | None = None
        self._waiting = True  # for that attempt's workers to begin
        self._thread = threading.Thread(target=self._run, daemon=True, name="evaluations")

    def __enter__(self) -> Evaluator:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._end.set()
        self._thread.join(_END_S)

    def make_room(self, attempt: str) -> None:
        """Ends what is under way, and begins nothing before that attempt's workers have begun."""
        with self._lock:
            self._attempt, self._waiting = attempt, True
            self._end.set()
        self._idle.wait(_END_S)

    def finish(self) -> None:
        """Waits for what is due, up to evaluate.wait_s or until a stop is asked for; then applies the retention."""
        if self._attempt is None:  # nothing was trained: no workers to wait for
            with self._lock:
                self._waiting = False
        until = time.monotonic() + self._config.evaluate.wait_s
        while self._thread.is_alive() and self._due.due() and time.monotonic() < until:
            if ray.get(self._keeper.stop_wanted.remote()) not in ("", recorder.RESTART):
                return
            time.sleep(_LOOK_S / 4)
        self._over.set()
        self._end.set()
        self._idle.wait(_END_S)
        for name in self._due.due():
            self._tell(
                "failed", name, f"not done within {self._config.evaluate.wait_s:g} s of the end (evaluate.wait_s)"
            )
            self._due.settle(name)
        Storage(self._config.run.folder).remove(measure.PARTS)  # of evaluations that were given up
        retain(self._checkpoints, Retention.of(self._config.train), self._due)

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                if self._may_begin():
                    self._next()
            except (UserError, RayError) as error:
                self._tell("failed", "", " ".join(str(error).split()))
            finally:
                self._idle.set()

    def _may_begin(self) -> bool:
        with self._lock:
            if self._waiting and ray.get(self._keeper.begun.remote()) == self._attempt:
                self._waiting = False
                self._end.clear()
            if not self._waiting:
                self._idle.clear()
            return not self._waiting

    def _next(self) -> None:
        """Does the newest that is due."""
        *older, newest = self._due.due() or [""]
        for name in older:
            self._tell("skipped", name, f"a newer checkpoint is due; evaluate.every = {self._config.evaluate.every} is "
                       "shorter than an evaluation takes")  # fmt: skip
            self._due.settle(name)
        if not newest:
            return
        began = time.monotonic()
        try:
            step, result, grid = self._evaluate(newest)
        except _EndedError:
            return
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, UserError) else error
            self._tell("failed", newest, str(cause).strip().splitlines()[-1])
        except (UserError, RayError) as error:
            self._tell("failed", newest, " ".join(str(error).split())[:300])
        else:
            self._due.keep(newest, step, result, grid)
            self._due.settle(newest)  # whatever becomes of the log, it is not done again
            self._log(newest, step, result, time.monotonic() - began)
        self._due.settle(newest)

    def _log(self, checkpoint: str, step: int, result: dict[str, Any] | None, seconds: float) -> None:
        scores = evaluations.scores_of(result or {})
        if EVALUATED in scores:
            ray.get(self._keeper.evaluated.remote({"step": step, **scores, "evaluation_s": seconds}))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if name != EVALUATED)
        text = f"{shown} ({scores[EVALUATED]} images)" if shown else "a grid; no evaluate.reference to judge by"
        self._tell("", checkpoint, f"step {step}: {text}, after {seconds:.1f} s", step=step, scores=scores)

    def _evaluate(self, checkpoint: str) -> tuple[int, dict[str, Any] | None, bytes]:
        """Raises _EndedError, and what the actor raised, also if it is too slow or finds no room (UserError)."""
        group = self._room()
        try:
            there = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
            judge: Any = ray.remote(_Judge).options(num_cpus=0, scheduling_strategy=there).remote()
            answer = judge.work.remote(self._config, self._checkpoints.at(checkpoint))
            until = time.monotonic() + self._config.evaluate.timeout_s
            while True:
                self._check_end()
                try:
                    return ray.get(answer, timeout=_LOOK_S / 8)
                except GetTimeoutError:
                    if time.monotonic() > until:
                        raise UserError(
                            f"took more than {self._config.evaluate.timeout_s:g} s (evaluate.timeout_s)"
                        ) from None
        finally:
            remove_placement_group(group)

    def _room(self) -> PlacementGroup:
        """Room for the pool, beside which a task that reads training's data still fits."""
        beside, resources = self._config.evaluate, self._config.resources
        if beside.accelerator != "same":
            resources = resources.model_copy(update={"accelerator": beside.accelerator})
        one = cluster.actor_options(resources, cluster.uses_gpu(resources))
        bundle = {"CPU": one["num_cpus"], **({"GPU": one["num_gpus"]} if one["num_gpus"] else {})}
        size, until = beside.actors, time.monotonic() + beside.start_timeout_s
        while True:
            self._check_end()
            if cluster.has_room(size, bundle, {"CPU": ingest.READ_TASK_CPUS}, _LOOK_S):
                group = placement_group([bundle] * size, strategy="PACK")
                if group.wait(_ROOM_S):
                    return group
                remove_placement_group(group)
            if time.monotonic() > until:
                raise UserError(
                    f"no room for {size} actors of {bundle} beside training within {beside.start_timeout_s:g} s "
                    "(evaluate.start_timeout_s); add nodes, or lower evaluate.actors"
                )
            self._end.wait(_LOOK_S)

    def _check_end(self) -> None:
        if self._end.is_set() or self._over.is_set():
            raise _EndedError

    def _tell(self, what: str, checkpoint: str, text: str, **facts: Any) -> None:
        kind = f"evaluation {what}".strip()
        about = {"event": kind, "checkpoint": checkpoint, **facts}
        ray.get(self._keeper.event.remote({**about, "text": f"{checkpoint}: {text}" if what and checkpoint else text}))
