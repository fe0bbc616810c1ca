"""What a run moves: collectives of a step by ZeRO stage, checkpoints, shards, requests to the object store.

Collectives take bytes over bandwidth, as rings do, and a latency for each hop of a tree. What is sent (arXiv
1910.02054, section 7, differs at stage 1): at stages 0 and 1 the whole gradients once a step, after the last backward
pass and hidden behind nothing; at stage 2 each micro-batch's gradients to their owners, bucket by bucket behind the
backward pass; at stage 3 the weights before each forward and backward pass (at most: DeepSpeed keeps what it needs
again soon), and each micro-batch's gradients to their owners. Stages 1 and 2 then gather the new weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dico_ray import measured
from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config
from dico_ray.config.train import BUCKET_ELEMENTS
from dico_ray.data.shards import sample_bytes
from dico_ray.planning.memory import gpu_of

_AFTERWARDS = 500_000_000  # elements that DeepSpeed reduces at a time where it does so after the backward pass
_BACKWARD = 2 / 3  # of a step's arithmetic


@dataclass(frozen=True)
class Exchange:
    """A step's collectives of one worker: bytes that it sends, seconds that they take, seconds nothing hides."""

    sent: float
    seconds: float
    exposed: float


def bandwidth(config: Config, workers: int) -> float:
    """Bytes/s one way that a worker's collectives reach: its node's links, or the nodes' networks if these are slower.

    A ring enters and leaves a node once, so all of the node's network serves it.
    """
    hardware = config.hardware
    link = hardware.link_gb_s * 1e9 if hardware.link_gb_s else gpu_of(config).link
    each = max(1, config.cluster.gpus_per_node)
    network = each * hardware.network_gbit_s / 8 * 1e9
    return hardware.link_share * (link if workers <= each else min(link, network))


def exchange(config: Config, workers: int, micros: int, compute_s: float) -> Exchange:
    """The collectives of one step of `micros` micro-batches a worker.

    compute_s: seconds that a step's forward and backward passes take, behind which stages 2 and 3 hide theirs.
    """
    if workers == 1:
        return Exchange(0, 0, 0)
    train, count = config.train, parameter_count(config.model)
    value = 2 if train.precision == "bf16" else 4
    rate, hop = bandwidth(config, workers), config.hardware.latency_us * 1e-6 * math.ceil(math.log2(workers))
    part = (workers - 1) / workers
    calls = math.ceil(count / (BUCKET_ELEMENTS if train.zero_stage >= 2 else _AFTERWARDS))

    def seconds(sent: float, times: float) -> float:
        return sent / rate + hop * times

    gradient = 2 if train.zero_stage == 0 and train.precision == "bf16" else 4  # bytes of an element
    reduced, gathered = 2 * part * count * gradient, part * count * value
    if train.zero_stage < 2:
        after = seconds(reduced, 2 * calls) + (seconds(gathered, 1) if train.zero_stage else 0)
        return Exchange(reduced + (gathered if train.zero_stage else 0), after, after)
    forward, backward = compute_s * (1 - _BACKWARD), compute_s * _BACKWARD
    if train.zero_stage == 2:
        # A bucket goes to each of its owners for itself; DeepSpeed's own sums, for an offloaded optimizer, go to all.
        sent, times = (reduced, 2 * calls) if train.offload else (reduced / 2, calls + workers - 1)
        during, last = micros * seconds(sent, times), seconds(sent / calls, times / calls)
        after = seconds(gathered, 1)
        return Exchange(micros * sent + gathered, during + after, max(last, during - backward) + after)
    gather = micros * seconds(gathered, calls)
    scatter = micros * seconds(reduced / 2, calls)
    first, last = seconds(gathered / calls, 1), seconds(reduced / 2 / calls, 1)
    exposed = max(first, gather - forward) + max(last, gather + scatter - backward)
    return Exchange(micros * (2 * gathered + reduced / 2), 2 * gather + scatter, exposed)


@dataclass(frozen=True)
class Saving:
    """A checkpoint: its bytes, a worker's part of it, and by the measured rates how long that part takes."""

    nbytes: int
    part: float
    stall_s: float
    least_s: float
    most_s: float


def checkpoint(config: Config, workers: int) -> Saving:
    """Weights, two moments and the averages, in fp32. Each worker writes its part, as fast as the measured one did."""
    averages = 1 + len(config.train.ema_profiles)
    nbytes = parameter_count(config.model) * 4 * (3 + averages)
    row = dict(next(row for row in measured.rows() if row.what == measured.CHECKPOINT).values)
    share = nbytes / workers / (row["gb"] * 1e9)
    return Saving(
        nbytes, nbytes / workers, share * row["stall_s"], share * row["committed_s_least"],
        share * row["committed_s_most"],
    )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What training asks of the object store, and of Ray's own, in a second.

    requests, nbytes: ranges, and the bytes in them, of the latent shards. blocks: bytes through Ray's object store.
    held: bytes that the windows in flight take in it.
    """

    requests: float
    nbytes: float
    blocks: float
    held: float


def shard_bytes(config: Config, samples: int) -> int:
    """Bytes of `samples` samples in latent shards (both flips, tar headers included)."""
    return samples * _sample_bytes(config)


def reading(config: Config, images_per_s: float) -> Reading:
    """Of training at that rate. Each window reads its chunks whole, and shares its first and last with a neighbour."""
    data, train = config.data, config.train
    sample = _sample_bytes(config)
    chunk = max(1, config.encode.chunk_bytes // sample)
    rows = -(-data.window_samples // train.global_batch) * train.global_batch
    chunks = -(-rows // chunk) + 1
    windows = images_per_s / rows
    side = config.model.latent_size
    row = 4 * 8 + config.model.in_channels * side * side * 2
    return Reading(
        requests=windows * chunks,
        nbytes=windows * chunks * chunk * sample,
        blocks=images_per_s * row,
        held=rows * row * (data.read_tasks + 2),
    )


def _sample_bytes(config: Config) -> int:
    side = config.model.latent_size
    return sample_bytes(config.model.in_channels, side, side)
