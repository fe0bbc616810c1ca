"""The training loop. It knows no Ray: batches come from an iterator, numbers go to a report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from dico_ray.config import Config, UserError
from dico_ray.data.latents import draw_posterior
from dico_ray.data.shards import LatentBatch
from dico_ray.diffusion.noise import Stream, bernoulli, integers, normal
from dico_ray.diffusion.process import Diffusion
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine


class DivergedError(UserError):
    """The loss is no longer finite: says when, and what to change."""


class Report(Protocol):
    """Where a run's numbers and checkpoints go. Steps count finished optimizer steps."""

    def log(self, metrics: dict[str, Any]) -> None: ...

    def save(self, step: int) -> None: ...

    def snapshot(self, step: int) -> None:
        """Keeps the averages of train.ema_profiles as they are now, for post-hoc reconstruction."""
        ...


def learning_rate(config: Config, step: int) -> float:
    """Of the step that follows `step` finished ones: linear warm-up, then constant."""
    warmup = config.train.warmup_steps
    return config.train.lr * min(1.0, (step + 1) / warmup if warmup else 1.0)


def snapshot_due(config: Config, done: int) -> bool:
    """Whether the averages are kept after `done` finished steps."""
    every = config.train.ema_snapshot_every
    return every is not None and (done % every == 0 or done == config.train.steps)


def train_loop(config: Config, engine: Engine, ema: EMA, batches: Iterator[LatentBatch], report: Report) -> None:
    """Trains on the batches that come, up to train.steps; each batch says which step it is.

    The steps' losses, and so the curve, depend on config and data alone: timesteps, noise and label drops are
    drawn by (seed, step, row).
    """
    diffusion = Diffusion()
    meter = _Meter(config, engine)
    for batch in batches:
        meter.batch_arrived()
        engine.set_lr(learning_rate(config, batch.step))
        losses, norm = train_step(config, engine, diffusion, batch)
        done = batch.step + 1
        ema.update(done)
        meter.add(losses, norm)
        if done % config.train.log_every == 0 or done == config.train.steps:
            report.log(meter.flush(done, learning_rate(config, batch.step)))
        # Before the checkpoint: a run that is resumed there has its snapshot.
        if snapshot_due(config, done):
            report.snapshot(done)
            meter.checkpoint_done()
        if done % config.train.checkpoint_every == 0 or done == config.train.steps:
            report.save(done)
            meter.checkpoint_done()
        if done == config.train.steps:
            return


def train_step(config: Config, engine: Engine, diffusion: Diffusion, batch: LatentBatch) -> tuple[Tensor, Tensor]:
    """One optimizer step: this rank's mean loss, mse and vb (3,), and the global gradient norm ()."""
    seed, null = config.run.seed, config.model.num_classes
    device = engine.device
    rows = torch.tensor(batch.rows, device=device)
    labels = torch.tensor(batch.labels, device=device)
    latents = torch.tensor(batch.latents, device=device).float()
    if latents.shape[1] == 2 * config.model.in_channels:  # of the autoencoder's posterior: drawn anew each time
        shape = (config.model.in_channels, *latents.shape[2:])
        latents = draw_posterior(latents, normal(seed, Stream.TRAIN_POSTERIOR, batch.step, rows, shape))
    t = integers(seed, Stream.TIMESTEP, batch.step, rows, diffusion.num_steps)
    dropped = bernoulli(seed, Stream.LABEL_DROP, batch.step, rows, config.train.label_drop)
    y = torch.where(dropped, null, labels)
    size = engine.micro_batch
    sums = torch.zeros(3, device=device)
    norm = None
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        noise = normal(seed, Stream.NOISE, batch.step, rows[part], tuple(latents.shape[1:]))
        terms = diffusion.training_losses(engine, latents[part], t[part], noise, y=y[part])
        norm = engine.backward(terms["loss"].mean())
        sums += torch.stack([terms[name].detach().mean() for name in ("loss", "mse", "vb")])
    assert norm is not None, "the last micro-batch must end the step"
    return sums * (size / len(rows)), norm


class _Meter:
    """Collects a step's numbers on the device, and asks for them only when they are logged."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._began = self._asked = time.perf_counter()
        self._waited = self._stalled = 0.0

    def batch_arrived(self) -> None:
        self._waited += time.perf_counter() - self._asked

    def add(self, losses: Tensor, norm: Tensor) -> None:
        self._losses.append(losses)
        self._norms.append(norm)
        self._asked = time.perf_counter()

    def checkpoint_done(self) -> None:
        now = time.perf_counter()
        self._stalled += now - self._asked
        self._asked = now

    def flush(self, step: int, lr: float) -> dict[str, Any]:
        """Means over the steps since the last flush. Raises DivergedError if the loss is not finite."""
        count = len(self._losses)
        local = torch.cat([torch.stack(self._losses).mean(0), torch.stack(self._norms).mean()[None]])
        loss, mse, vb, norm = self._engine.mean(local)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} within the {count} steps before step {step}; lower train.lr, set train.grad_clip, "
                "or take train.precision fp32; the last checkpoint is from before"
            )
        now = time.perf_counter()
        span = now - self._began
        metrics = {
            "step": step, "loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": lr,
            "images_per_s": count * self._config.train.global_batch / span,
            "data_wait": self._waited / span, "checkpoint_stall_s": self._stalled,
            "skipped_steps": self._engine.skipped_steps, "epoch_images": step * self._config.train.global_batch,
        }  # fmt: skip
        self._losses, self._norms = [], []
        self._began = self._asked = now
        self._waited = self._stalled = 0.0
        return metrics
