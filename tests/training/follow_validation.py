"""One rank of `torchrun`: each case trains with and without validation.

    torchrun --nproc-per-node N -m tests.training.follow_validation OUTPUT HELD_OUT '[{"zero_stage": 0, ...}, ...]'

Writes OUTPUT/curves.json, for each case {"with": losses by step, "without": the same, "validated": metrics by step},
and of each case that validated OUTPUT/case-I/, a checkpoint of the end.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from dico_ray.config import Config
from dico_ray.settings import build, merge
from dico_ray.storage import Storage
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.loop import train_loop
from dico_ray.training.validation import Validation
from tests.training import oracle
from tests.training.follow_oracle import batches
from tests.training.saving import save


class Logged:
    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def stepped(self, step: int) -> bool:
        return False


def follow(config: Config, validates: bool, folder: Storage) -> list[dict[str, Any]]:
    engine = Engine(oracle.initial_model(config), config.train, torch.device("cpu"))
    ema, logged = EMA(engine, config.train.ema_decay), Logged()
    validate = Validation(config, engine, ema) if validates else None
    train_loop(config, engine, ema, batches(config, engine.rank), logged, (), validate)
    if validates:
        save(folder, config.train.steps, engine, ema, {"config": config.model_dump(mode="json")})
    engine.close()
    return logged.metrics


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    output, held_out, found = Storage(sys.argv[1]), sys.argv[2], []
    for i, case in enumerate(json.loads(sys.argv[3])):
        config = oracle.settings({**case, "num_workers": dist.get_world_size()})
        given = {"data": {"validation": held_out, "validation_samples": 50}, "train": {"validate_every": 4}}
        validating = build(merge(config.model_dump(), given))
        plain, with_it = follow(config, False, output), follow(validating, True, output.at(f"case-{i}"))
        found.append({
            "without": [m["loss"] for m in plain],
            "with": [m["loss"] for m in with_it],
            "validated": {m["step"]: m for m in with_it if "val_loss" in m},
        })  # fmt: skip
    if dist.get_rank() == 0:
        output.write("curves.json", json.dumps(found).encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
