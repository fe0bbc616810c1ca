"""One rank of `torchrun`: the loop and the engine, over the data that tests/training/oracle.py trains on.

    torchrun --nproc-per-node N -m tests.training.follow_oracle OUTPUT '[[SEED, {"zero_stage": 0, ...}], ...]'

Writes, for each case, OUTPUT/case-I/curves.json (losses and gradient norms by step) and a checkpoint of the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dico_ray.config import Config
from dico_ray.data.order import rank_rows
from dico_ray.data.shards import LatentBatch
from dico_ray.storage import Storage
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.loop import train_loop
from tests.training import oracle
from tests.training.saving import save


class Curves:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.losses.append(metrics["loss"])
        self.norms.append(metrics["grad_norm"])

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def stepped(self, step: int) -> bool:
        return False


def batches(config: Config, rank: int) -> Iterator[LatentBatch]:
    """A rank's part of the stream, as the door's windows give it, from memory."""
    latents, labels = oracle.data()
    order, world_size = oracle.order_of(config), dist.get_world_size()
    mine = rank_rows(order, world_size, rank).reshape(order.window_steps, -1)
    for step in range(config.train.steps):
        window, place = divmod(step, order.window_steps)
        at = mine[place]
        keys, flips = order.window_keys(window)[at], order.window_flips(window)[at]
        yield LatentBatch(step, at % config.train.global_batch, latents[keys, flips], labels[keys], np.asarray(keys))


def follow(config: Config, folder: Storage) -> None:
    model = oracle.initial_model(config)
    engine = Engine(model, config.train, torch.device("cpu"), oracle.rates_of(model, config))
    ema, curves = EMA(engine, config.train.ema_decay), Curves()
    train_loop(config, engine, ema, batches(config, engine.rank), curves)
    save(folder, config.train.steps, engine, ema, {})
    if engine.rank == 0:
        folder.write("curves.json", json.dumps([curves.losses, curves.norms]).encode())
    engine.close()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    output = Storage(sys.argv[1])
    for i, (seed, case) in enumerate(json.loads(sys.argv[2])):
        follow(oracle.settings({**case, "num_workers": dist.get_world_size()}, seed), output.at(f"case-{i}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
