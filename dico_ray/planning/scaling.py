"""From one GPU to a thousand: a step's time by its parts, and what keeps more GPUs from helping.

A step is the sum of its parts: micro-batches one after the other (work, and launches that do not shrink with them),
the collectives that nothing hides, and the optimizer's and the averages' pass over a worker's state. Workers are
alike and none waits for data, a checkpoint or a slower one: what a cluster adds of that is not forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from dico_ray.arithmetic import parameter_count, training_flops
from dico_ray.config import Config
from dico_ray.measured import Row
from dico_ray.planning.memory import config_state, gpu_of, largest_micro_batch
from dico_ray.planning.speed import Time, micro_batch_time
from dico_ray.planning.traffic import exchange

MOST = 1024
_HELPS = 1.5  # times the rate that twice the GPUs must give, to be worth it
_PARTS = ("work", "launches", "communication", "update")
_WHY = {  # a step's part takes more of it on more GPUs
    "launches": "launches take as long for a few images as for many",
    "communication": "collectives that nothing hides do not shrink",
    "update": "the optimizer's pass over the state does not shrink",
}


@dataclass(frozen=True)
class Point:
    """One step on `workers` GPUs. work_s .. update_s are its parts in seconds; efficiency is to one GPU's work alone.

    sent_gb: what a worker sends in collectives. hidden_s: seconds of these that the backward pass hides.
    binds: the largest part. least_s, most_s: the step by the least and the most that measured rows say of its
    micro-batches. basis and row: where these come from, as in `speed.Time`.
    """

    workers: int
    global_batch: int
    micro_batch: int
    accumulation: int
    work_s: float
    launches_s: float
    communication_s: float
    update_s: float
    hidden_s: float
    sent_gb: float
    step_s: float
    least_s: float
    most_s: float
    images_per_s: float
    mfu: float
    efficiency: float
    binds: str
    basis: str
    row: Row


def step(config: Config, workers: int, global_batch: int | None = None) -> Point | None:
    """Of the config's run on so many workers, by the largest micro-batch that fits and train.micro_batch allows.

    global_batch: instead of train.global_batch; a multiple of workers. None where nothing fits, or no speed is known.
    """
    batch, train = global_batch or config.train.global_batch, config.train
    share = batch // workers
    most = min(largest_micro_batch(config, train.zero_stage, workers), train.micro_batch or share, share)
    micro = max((size for size in range(1, most + 1) if share % size == 0), default=0)
    time = micro_batch_time(config, micro, workers=workers) if micro else None
    if time is None:
        return None
    return _point(config, workers, batch, micro, time)


def _point(config: Config, workers: int, batch: int, micro: int, time: Time) -> Point:
    micros = batch // workers // micro
    compute, launches = micros * time.seconds, micros * time.launches_s
    moved = exchange(config, workers, micros, compute)
    update = update_seconds(config, workers)
    parts = dict(zip(_PARTS, (compute - launches, launches, moved.exposed, update), strict=True))
    seconds = sum(parts.values())
    gpu, flops = gpu_of(config), training_flops(config.model)
    rate = batch / seconds
    return Point(
        workers=workers, global_batch=batch, micro_batch=micro, accumulation=micros,
        work_s=parts["work"], launches_s=launches, communication_s=moved.exposed, update_s=update,
        hidden_s=moved.seconds - moved.exposed, sent_gb=moved.sent / 1e9,
        step_s=seconds, least_s=seconds - micros * (time.seconds - time.least_s),
        most_s=seconds + micros * (time.most_s - time.seconds), images_per_s=rate,
        mfu=rate * flops / workers / gpu.peak_flops, efficiency=parts["work"] / seconds,
        binds=max(parts, key=parts.__getitem__), basis=time.basis, row=time.row,
    )  # fmt: skip


def update_seconds(config: Config, workers: int) -> float:
    """Optimizer and averages, by the bytes of a worker's state that pass through its memory.

    AdamW reads gradient, weight and moments, and writes all but the first and the network's weight; each average is
    read beside the weight, and written.
    """
    train = config.train
    state = config_state(config, train.zero_stage, workers)
    owned = parameter_count(config.model) / (workers if train.zero_stage else 1)
    weight = 2 if train.precision == "bf16" else 4
    return (owned * (4 + 3 * 8 + weight) + 3 * state.ema) / gpu_of(config).bandwidth


def ladder(config: Config, most: int = MOST) -> list[Point]:
    """Steps of the run's own global batch on 1, 2, 4 .. `most` GPUs, and on its own number of them, where they fit."""
    sizes = {2**power for power in range(most.bit_length())} | {config.train.world_sizes[0]}
    divide = sorted(size for size in sizes if size <= most and config.train.global_batch % size == 0)
    return [point for size in divide if (point := step(config, size))]


def grown(config: Config, most: int = MOST) -> list[Point]:
    """The same if the global batch grows with the GPUs: on each the largest micro-batch that fits, once a step."""
    points = []
    for size in (2**power for power in range(most.bit_length())):
        largest = largest_micro_batch(config, config.train.zero_stage, size)
        micro = min(largest, config.train.micro_batch or largest, config.train.global_batch)
        if micro and (point := step(config, size, size * micro)):
            points.append(point)
    return points


def limit(points: list[Point]) -> tuple[Point, str]:
    """The most GPUs that still help, and why more do not: twice as many must give 1.5 times the rate.

    points: of one global batch, by number of workers; at least one.
    """
    for low, high in pairwise(points):
        gain = high.images_per_s / low.images_per_s
        if gain < _HELPS ** math.log2(high.workers / low.workers):
            why = _WHY[max(_WHY, key=lambda part: _share(high, part) - _share(low, part))]
            return low, f"{high.workers} GPUs would give {gain:.2f} times its rate: {why}"
    last = points[-1]
    if last.workers == last.global_batch:
        return last, f"the global batch of {last.global_batch} has no sample for more"
    if 2 * last.workers > MOST:
        return last, "no limit found so far"
    return last, f"the global batch of {last.global_batch} does not divide among twice as many"


def _share(point: Point, part: str) -> float:
    return getattr(point, f"{part}_s") / point.step_s
