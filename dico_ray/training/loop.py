"""The training loop. It knows no Ray: batches come from an iterator, numbers go to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
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
from dico_ray.training.meter import Meter


class DivergedError(UserError):
    """Steps in a row without finite gradients: names the steps and the samples at fault, and says what to change."""

    def __init__(self, text: str, steps: tuple[int, ...] = ()) -> None:
        super().__init__(text, steps)
        self.text, self.steps = text, steps

    def __str__(self) -> str:
        return self.text


class Report(Protocol):
    """Where a run's numbers and checkpoints go. Steps count finished optimizer steps."""

    def log(self, metrics: dict[str, Any]) -> None: ...

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        """Begins a checkpoint. metrics: the last logged ones."""
        ...

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        """Keeps the averages of train.ema_profiles as they are now, for post-hoc reconstruction."""
        ...

    def stepped(self, step: int) -> bool:
        """A step is finished; whether this rank wants training to stop here, with a checkpoint."""
        ...


def learning_rate(config: Config, step: int) -> float:
    """Of the step that follows `step` finished ones: linear warm-up, then constant."""
    warmup = config.train.warmup_steps
    return config.train.lr * min(1.0, (step + 1) / warmup if warmup else 1.0)


def snapshot_due(config: Config, done: int) -> bool:
    """Whether the averages are kept after `done` finished steps."""
    every = config.train.ema_snapshot_every
    return every is not None and (done % every == 0 or done == config.train.steps)


def validation_due(config: Config, done: int) -> bool:
    """Whether the averages are validated after `done` finished steps."""
    every = config.train.validate_every
    return every is not None and (done % every == 0 or done == config.train.steps)


def train_loop(
    config: Config, engine: Engine, ema: EMA, batches: Iterator[LatentBatch], report: Report,
    passed_over: Container[int] = (), validate: Callable[[], dict[str, float]] | None = None,
) -> int:  # fmt: skip
    """Trains on the batches that come, up to train.steps; each batch says which step it is. Returns the steps done.

    The steps' losses, and so the curve, depend on config and data alone: timesteps, noise and label drops are
    drawn by (seed, step, row). passed_over: steps whose batches are not trained on. validate: gives metrics of the
    averages as they are, for train.validate_every; its time is no step's. Ends early, after a checkpoint, when a
    rank's report asks for it. Raises DivergedError after train.max_skipped_steps bad steps in a row.
    """
    diffusion, meter = Diffusion(), Meter(config, engine)
    metrics: dict[str, Any] = {}
    bad: list[LatentBatch] = []
    done = 0
    for batch in batches:
        meter.batch_arrived()
        done = batch.step + 1
        if batch.step not in passed_over:
            engine.set_lr(learning_rate(config, batch.step))
            losses, norm, rows = train_step(config, engine, diffusion, batch)
            with engine.phase("ema"):
                ema.update(done)
            bad = [*bad, batch] if engine.skipped_last else []
            if len(bad) >= config.train.max_skipped_steps:
                raise _diverged(config, engine, bad, rows)
            meter.add(losses, norm, engine.skipped_last)
        validating = validate is not None and validation_due(config, done)
        if done % config.train.log_every == 0 or done == config.train.steps or validating:
            fresh = meter.flush(done, learning_rate(config, batch.step))
            if validate and validating and fresh:
                fresh |= _validated(validate, meter)
            if fresh:
                metrics = fresh
                report.log(metrics)
        stop = engine.agree(report.stepped(done))
        last = done == config.train.steps or stop
        # Before the checkpoint: a run that is resumed there has its snapshot.
        if snapshot_due(config, done):
            report.snapshot(done, metrics)
            meter.checkpoint_done()
        # Among bad steps the state may be their cause: none is kept to go back to.
        if last or (done % config.train.checkpoint_every == 0 and not bad):
            report.save(done, metrics)
            meter.checkpoint_done()
        if last:
            break
    return done


def _validated(validate: Callable[[], dict[str, float]], meter: Meter) -> dict[str, float]:
    began = time.perf_counter()
    found = validate()
    meter.left_out(began)
    return {**found, "validation_s": time.perf_counter() - began}


def _diverged(config: Config, engine: Engine, bad: list[LatentBatch], rows: Tensor) -> DivergedError:
    """rows: bool (B,), which of this rank's samples of the last batch had no finite loss."""
    mine = bad[-1].keys[rows.cpu().numpy()].tolist()
    keys = sorted(key for found in engine.gather(mine) for key in found)
    steps = tuple(batch.step for batch in bad)
    samples = f"samples {', '.join(map(str, keys[:8]))} of the data set" if keys else "no single sample is at fault"
    return DivergedError(
        f"the gradients of steps {steps[0]} to {steps[-1]} were not finite (train.max_skipped_steps = "
        f"{config.train.max_skipped_steps}; in the last of them: {samples}); if going back does not help, lower "
        "train.lr, set train.grad_clip, or take train.precision fp32",
        steps,
    )


def train_step(
    config: Config, engine: Engine, diffusion: Diffusion, batch: LatentBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step: this rank's mean loss, mse and vb (3,), the global gradient norm (), bad rows bool (B,)."""
    seed, null = config.run.seed, config.model.num_classes
    device = engine.device
    with engine.phase("draw"):
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
    sums, bad = torch.zeros(3, device=device), []
    norm = None
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        with engine.phase("draw"):
            noise = normal(seed, Stream.NOISE, batch.step, rows[part], tuple(latents.shape[1:]))
        with engine.phase("forward"):
            terms = diffusion.training_losses(engine, latents[part], t[part], noise, y=y[part])
            loss = terms["loss"].mean()
        norm = engine.backward(loss)
        sums += torch.stack([terms[name].detach().mean() for name in ("loss", "mse", "vb")])
        bad.append(~torch.isfinite(terms["loss"].detach()))
    assert norm is not None, "the last micro-batch must end the step"
    return sums * (size / len(rows)), norm, torch.cat(bad)
