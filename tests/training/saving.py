"""Saving a checkpoint and waiting for it, for tests of what is in one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dico_ray.storage import Storage
from dico_ray.training import attempts
from dico_ray.training.attempts import Attempt
from dico_ray.training.checkpoint import Checkpoint, Retention, averages, find, state
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.snapshot import Named
from dico_ray.training.writer import CheckpointWriter

KEEP_ALL = Retention(last=10**6)


def claimed(storage: Storage, launch: str = "test") -> Attempt:
    """A new attempt that begins at the last checkpoint."""
    attempt = attempts.claim(storage, launch, None)
    last = Checkpoint.last(storage)
    return attempts.settle(storage, attempt, last.step if last else 0)


def writer(
    storage: Storage, engine: Engine, ema: EMA, attempt: Attempt, events: list[dict[str, Any]] | None = None,
    rule: Retention = KEEP_ALL, max_failed: int = 0, patience_s: float = 60,
    what: Callable[[Engine, EMA], list[Named]] = state,
) -> CheckpointWriter:  # fmt: skip
    take = [].append if events is None else events.append
    tensors = partial(what, engine, ema)
    return CheckpointWriter(storage, attempt, engine, tensors, rule, max_failed, take, patience_s)


def save_averages(storage: Storage, step: int, engine: Engine, ema: EMA, about: dict[str, Any]) -> Checkpoint:
    """The averages alone, as snapshots have them."""
    return save(storage, step, engine, ema, about, what=averages)


def save(
    storage: Storage, step: int, engine: Engine, ema: EMA, about: dict[str, Any], rule: Retention = KEEP_ALL,
    what: Callable[[Engine, EMA], list[Named]] = state,
) -> Checkpoint:  # fmt: skip
    """Collective: every rank calls it; returns once rank 0 has committed it."""
    (attempt,) = engine.gather(claimed(storage) if engine.rank == 0 else None)[:1]
    mine = writer(storage, engine, ema, attempt, rule=rule, what=what)
    mine.save(step, about)
    mine.finish()
    engine.gather(None)
    (name,) = [f.name for f in find(storage) if f.step == step and f.attempt == attempt.name]
    return Checkpoint.open(storage.at(name))
