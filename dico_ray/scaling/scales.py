"""A scale of a sweep -> the settings that its trials train with: sizes, length, workers, ZeRO stage, micro-batch."""

from __future__ import annotations

from typing import Any

from dico_ray.arithmetic import parameter_count, training_flops
from dico_ray.config import ARCHITECTURES, SCALE, Config, ConfigError, Model
from dico_ray.planning.memory import memory_at
from dico_ray.settings import build, merge


def scaled(config: Config, scale: str) -> Config:
    """The config at another scale, before any other setting of a trial.

    Steps follow from sweep.budget, workers from sweep.worker_parameters, ZeRO stage and micro-batch from
    sweep.worker_memory_gb. Raises ConfigError if the scale does not fit into that memory.
    """
    model = _sizes(config.model, scale)
    at_scale = build(merge(config.model_dump(), {"model": model, "train": {"num_workers": 1, "micro_batch": None}}))
    steps = config.train.steps
    if config.sweep.budget == "flops":
        steps = max(1, round(steps * training_flops(config.model) / training_flops(at_scale.model)))
    workers = _workers(config, at_scale.model)
    train: dict[str, Any] = {"steps": steps, "num_workers": workers, "micro_batch": None}
    share = config.train.global_batch // workers
    most = min(config.train.micro_batch or share, share)
    train["micro_batch"] = max(size for size in range(1, most + 1) if share % size == 0)
    if config.sweep.worker_memory_gb:
        train |= _fit(at_scale, scale, workers, train["micro_batch"])
    return build(merge(config.model_dump(), {"model": model, "train": train}))


def _sizes(model: Model, scale: str) -> dict[str, Any]:
    if scale in ARCHITECTURES:
        return {"name": scale, "hidden_size": None, "depths": None, "ffn_ratio": None}
    found = SCALE.fullmatch(scale)
    assert found, "config checks the names of scales"
    if found["width"]:
        return {"hidden_size": int(found["width"])}
    own = model.architecture
    deeper = float(found["deeper"] or 1)
    return {
        "hidden_size": max(4, 2 * round(own.hidden_size * float(found["times"]) / 2)),
        "depths": tuple(max(1, round(depth * deeper)) for depth in own.depths),
    }


def _workers(config: Config, model: Model) -> int:
    """A worker for each sweep.worker_parameters parameters, up to train.num_workers' most, or the fewest."""
    sizes = config.train.world_sizes
    if config.sweep.worker_parameters is None:
        return sizes[-1]
    wanted = -(-parameter_count(model) // int(config.sweep.worker_parameters))
    return next((size for size in reversed(sizes) if size >= wanted), sizes[0])


def _fit(config: Config, scale: str, workers: int, micro_batch: int) -> dict[str, int]:
    """The least ZeRO stage (from train.zero_stage on) and the largest micro-batch that fit: memory before speed."""
    room = (config.sweep.worker_memory_gb or 0) * 1e9
    share = config.train.global_batch // workers
    micros = [size for size in range(micro_batch, 0, -1) if share % size == 0]
    for stage in range(config.train.zero_stage, 4):
        for micro in micros:
            if memory_at(config, stage, workers, micro) <= room:
                return {"zero_stage": stage, "micro_batch": micro}
    least = memory_at(config, 3, workers, 1) / 1e9
    raise ConfigError(
        f"sweep.scales: {scale} cannot fit: {least:.2f} GB a worker at ZeRO 3 and micro-batch 1 on {workers} workers, "
        f"but sweep.worker_memory_gb is {config.sweep.worker_memory_gb:g}; leave it out, or allow more workers "
        "(train.num_workers [1,N] with sweep.worker_parameters)"
    )
