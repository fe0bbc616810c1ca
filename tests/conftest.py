"""What tests of several rooms need: a Ray of their own, a process group of one, and small latent shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dico_ray.data.shards import MANIFEST, Manifest, sample_bytes, write_shard
from dico_ray.storage import Storage

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray that belongs to one test module; four CPUs of bookkeeping, whatever the machine has."""
    import ray

    from dico_ray import cluster

    cluster.quiet()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def one_process() -> None:
    """A torch.distributed group of one, for tests of the engine that need no second process."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher's variable
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def write_latents(folder: Path, shards: int = 4, samples: int = 50, chunk_samples: int = 16) -> Manifest:
    """A data set of 4x8x8 latents whose content tells its label, in `folder`."""
    storage, rng, records = Storage(str(folder)), np.random.default_rng(0), []
    for shard in range(shards):
        labels = rng.integers(0, 10, samples)
        noise = rng.standard_normal((samples, 2, 4, 8, 8)) * 0.3
        latents = (noise + labels[:, None, None, None, None] / 5 - 1).astype(np.float16)
        keys = [f"{shard * samples + i:09d}" for i in range(samples)]
        records.append(write_shard(storage, f"shard-{shard:05d}.tar", keys, latents, labels.tolist(), chunk_samples))
    manifest = Manifest(
        shards=tuple(records), chunk_samples=chunk_samples, sample_bytes=sample_bytes(4, 8, 8), channels=4,
        latent_size=(8, 8), classes=tuple(str(i) for i in range(10)), image_size=32,
        codec={"vae": "none", "hash": "none", "scale": 1.0}, statistics={"mean": [0.0] * 4, "std": [1.0] * 4},
    )  # fmt: skip
    storage.write(MANIFEST, manifest.to_json().encode())
    return manifest


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 200 samples in four shards."""
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return folder
