"""The loss of the averaged weights on held-out latents: one number that runs can be compared by.

Timesteps and noise are fixed: drawn by each sample's place in the held-out set, by a seed that is no setting. Labels
are never dropped, and images never mirrored. So the number depends on the weights and the data alone, to rounding,
whatever the seed of the run, its batch size, its ZeRO stage and its number of workers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dico_ray.config import Config, ConfigError
from dico_ray.data.latents import draw_posterior
from dico_ray.data.order import SampleOrder
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.diffusion.process import Diffusion
from dico_ray.storage import Storage
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine

SEED = 0
_TERMS = ("loss", "mse", "vb")


def check_held_out(config: Config, manifest: Manifest) -> None:
    """Raises ConfigError if data.validation is missing, or not of the kind that the run trains on."""
    held_out = Manifest.load(Storage(config.data.validation), "data.validation")
    facts = {
        "latents (channels, height, width)": lambda m: (m.latent_channels, *m.latent_size),
        "classes": lambda m: ", ".join(m.classes),
        "autoencoder's hash": lambda m: m.codec.get("hash"),
    }
    for what, fact in facts.items():
        theirs, ours = fact(held_out), fact(manifest)
        if theirs != ours:
            raise ConfigError(
                f"data.validation: the {what} of {config.data.validation}: {theirs}, but of data.latents: {ours}; "
                "encode both alike"
            )


def held_out_keys(count: int, wanted: int) -> np.ndarray:
    """Places of `wanted` samples, or all, spread evenly over a set of `count`: ascending, (min(count, wanted),)."""
    return np.arange(min(count, wanted)) * count // min(count, wanted)


class Validation:
    """One rank's. Reads its share of the held-out samples once, and keeps them in memory."""

    def __init__(self, config: Config, engine: Engine, ema: EMA) -> None:
        """Raises ConfigError or ShardError if data.validation cannot be read."""
        self._engine, self._ema, self._channels = engine, ema, config.model.in_channels
        self._diffusion = Diffusion()
        storage = Storage(config.data.validation)
        manifest = Manifest.load(storage, "data.validation")
        keys = held_out_keys(manifest.count, config.data.validation_samples)
        mine = np.array_split(keys, engine.world_size)[engine.rank]
        # Ranks that hold one sample less go through as many forward passes: at stage 3 all take part in each.
        share = -(-len(keys) // engine.world_size)
        self._rows = -(-share // engine.micro_batch) * engine.micro_batch
        self._count = len(mine)
        latents, labels = _read(storage, manifest, mine)
        self._latents = np.zeros((self._rows, *latents.shape[1:]), np.float16)
        self._labels, self._keys = np.zeros(self._rows, np.int64), np.zeros(self._rows, np.int64)
        self._latents[: self._count], self._labels[: self._count], self._keys[: self._count] = latents, labels, mine

    def __call__(self) -> dict[str, float]:
        """Means over all ranks' samples: val_loss, val_mse, val_vb, and how many samples. Every rank calls it."""
        size, device = self._engine.micro_batch, self._engine.device
        sums = torch.zeros(len(_TERMS) + 1, dtype=torch.float64, device=device)
        sums[-1] = self._count
        with self._engine.averaged(self._ema.tensors()):
            for start in range(0, self._rows, size):
                real = max(0, min(size, self._count - start))
                terms = self._losses(slice(start, start + size))
                sums[:-1] += torch.stack([terms[name][:real].double().sum() for name in _TERMS])
        *means, count = self._engine.mean(sums)
        samples = round(count * self._engine.world_size)
        return {**{f"val_{name}": mean / count for name, mean in zip(_TERMS, means, strict=True)},
                "validation_samples": samples}  # fmt: skip

    def _losses(self, part: slice) -> dict[str, Tensor]:
        """The loss and its parts of some of this rank's samples, each (B,)."""
        device = self._engine.device
        keys, labels = (torch.tensor(column[part], device=device) for column in (self._keys, self._labels))
        latents = torch.tensor(self._latents[part], device=device).float()
        shape = (self._channels, *latents.shape[2:])
        if latents.shape[1] == 2 * self._channels:  # of the autoencoder's posterior: one fixed draw
            latents = draw_posterior(latents, normal(SEED, Stream.VALIDATION_POSTERIOR, 0, keys, shape))
        t = integers(SEED, Stream.VALIDATION_TIMESTEP, 0, keys, self._diffusion.num_steps)
        noise = normal(SEED, Stream.VALIDATION_NOISE, 0, keys, shape)
        found = self._diffusion.training_losses(self._engine, latents, t, noise, y=labels)
        return {name: value.detach() for name, value in found.items()}  # or the graph would outlive the next forward


def _read(storage: Storage, manifest: Manifest, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plain images' latents of these samples (N, C, H, W) float16, and their labels (N,)."""
    shape = (0, manifest.channels, *manifest.latent_size)
    latents, labels = [np.zeros(shape, np.float16)], [np.zeros(0, np.int64)]
    order = SampleOrder(manifest.chunk_sizes, 1, 1, SEED)
    for chunk in order.chunks_of(keys):  # one at a time: of a chunk a few samples stay
        samples = read_chunks(storage, manifest, [chunk])
        held = order.chunk_keys(chunk)
        places = keys[np.isin(keys, held)] - held[0]
        latents.append(samples.pick(places, np.zeros(len(places), np.int64)))
        labels.append(samples.labels[places])
    return np.concatenate(latents), np.concatenate(labels)
