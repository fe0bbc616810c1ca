"""What a GPU's tensors take at most in training steps through the engine.

    python tests/planning/measure_memory.py RECIPE MICRO_BATCH KERNELS

Prints the bytes that the GPU's allocator had handed out at most in two steps: where stages are CUDA graphs, what these
take shows when they are captured, in the first.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from dico_ray.data.shards import LatentBatch
from dico_ray.diffusion.process import Diffusion
from dico_ray.models import create_model
from dico_ray.recipes import resolve
from dico_ray.training.ema import EMA
from dico_ray.training.loop import train_step
from dico_ray.training.prepare import prepare

ACCUMULATION = 2


def peak(recipe: str, micro_batch: int, kernels: str) -> int:
    batch = ACCUMULATION * micro_batch
    train = {"num_workers": 1, "micro_batch": micro_batch, "global_batch": batch}
    config = resolve(recipe, None, {"model": {"kernels": kernels}, "train": train})
    model, device = create_model(config.model.name, class_dropout_prob=0.0), torch.device("cuda", 0)
    engine, _ = prepare(model, config, device)
    ema, diffusion, side = EMA(engine, config.train.ema_decay), Diffusion(), config.model.latent_size
    latents = np.random.default_rng(0).standard_normal((batch, 4, side, side)).astype(np.float16)
    for step in range(2):
        rows = np.arange(batch)
        train_step(config, engine, diffusion, LatentBatch(step, rows, latents, rows % 1000, rows))
        ema.update(step + 1)
    return torch.cuda.max_memory_allocated()


def main() -> None:
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.cuda.set_device(0)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    print(peak(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
