"""What training must do, said plainly: one process, whole batches, AdamW, a deep-copied EMA; no DeepSpeed.

The engine and the loop at every ZeRO stage, precision and number of workers are held against it.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dico_ray.config import Config
from dico_ray.data.order import SampleOrder
from dico_ray.diffusion.noise import Stream, bernoulli, integers, normal
from dico_ray.diffusion.process import Diffusion
from dico_ray.models import DiCo, mup
from dico_ray.settings import build

CLASSES, CHUNKS = 10, (16, 16, 16, 16, 16, 20)  # an epoch of 100 samples ends within a batch of 16


class Run(NamedTuple):
    """losses and norms: one a step; weights and ema: after the last step, by parameter name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]


def settings(train: dict[str, Any], seed: int = 0) -> Config:
    """A tiny run with every part of the step in use: warm-up, clipping, weight decay, label drops, flips."""
    common = {
        "steps": 60, "global_batch": 16, "lr": 2e-3, "warmup_steps": 20, "weight_decay": 0.05, "grad_clip": 0.5,
        "ema_decay": 0.95, "label_drop": 0.2, "log_every": 1, "precision": "fp32",
    }  # fmt: skip
    return build({
        "run": {"seed": seed},
        "model": {"hidden_size": 8, "depths": [1] * 5, "num_classes": CLASSES, "latent_size": 8},
        "data": {"window_samples": 40},
        "train": {**common, **train},
    })  # fmt: skip


def data() -> tuple[np.ndarray, np.ndarray]:
    """A picture a class under some noise, and its mirror image: latents (N, 2, 4, 8, 8) float16, labels (N,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, sum(CHUNKS))
    plain = rng.standard_normal((CLASSES, 4, 8, 8))[labels] + 0.3 * rng.standard_normal((len(labels), 4, 8, 8))
    return np.stack([plain, plain[..., ::-1]], axis=1).astype(np.float16), labels


def initial_model(config: Config) -> DiCo:
    torch.manual_seed(config.run.seed)
    a = config.model.architecture
    model = DiCo(a.hidden_size, a.depths, a.ffn_ratio, CLASSES, class_dropout_prob=0.0)
    if config.train.mup_width:
        mup.initialize(model, config.train.mup_width)
    return model


def rates_of(model: DiCo, config: Config) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by."""
    if config.train.mup_width:
        return mup.learning_rates(model, config.train.mup_width)
    return {name: 1.0 for name, _ in model.named_parameters()}


def order_of(config: Config) -> SampleOrder:
    return SampleOrder(CHUNKS, config.train.global_batch, config.data.window_samples, config.run.seed)


def train(config: Config) -> Run:
    """train.steps steps in fp32, whatever the config's workers, micro-batch, stage and precision."""
    settings, seed, batch = config.train, config.run.seed, config.train.global_batch
    model, diffusion, order = initial_model(config), Diffusion(), order_of(config)
    ema = copy.deepcopy(model)
    rates = list(rates_of(model, config).values())
    adam = torch.optim.AdamW(
        [{"params": [p], "weight_decay": settings.weight_decay / r}
         for p, r in zip(model.parameters(), rates, strict=True)],
        settings.lr, settings.betas,
    )  # fmt: skip
    latents, all_labels = data()
    rows = torch.arange(batch)
    losses, norms = [], []
    for step in range(settings.steps):
        window, place = divmod(step, order.window_steps)
        mine = slice(place * batch, (place + 1) * batch)
        keys, flips = order.window_keys(window)[mine], order.window_flips(window)[mine]
        x0, labels = torch.tensor(latents[keys, flips]).float(), torch.tensor(all_labels[keys])
        t = integers(seed, Stream.TIMESTEP, step, rows, diffusion.num_steps)
        noise = normal(seed, Stream.NOISE, step, rows, x0.shape[1:])
        dropped = bernoulli(seed, Stream.LABEL_DROP, step, rows, settings.label_drop)
        labels[dropped] = CLASSES
        loss = diffusion.training_losses(model, x0, t, noise, y=labels)["loss"].mean()
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or float("inf"))))
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        adam.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(settings.ema_decay).add_(weight, alpha=1 - settings.ema_decay)
        losses.append(float(loss.detach()))
    return Run(losses, norms, *({n: p.detach() for n, p in net.named_parameters()} for net in (model, ema)))
