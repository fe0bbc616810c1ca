"""The stream: latent shards -> Ray Data -> one rank's batches, in the global order of data/order.py.

Ray Data's task for a window reads its chunks, picks each sample's flip and hands out one block a rank, in rank
order. Blocks of equal rows in preserved order make `streaming_split(n, equal=True)` a strict round robin, so
rank r gets its blocks of every window. Each row says which step and place it belongs to; the consumer checks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from dico_ray import prometheus
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.cache import ChunkCache
from dico_ray.data.order import SampleOrder, rank_rows
from dico_ray.data.reader import Samples, Scratch, each_chunk
from dico_ray.data.shards import LatentBatch, Manifest
from dico_ray.storage import Storage, retried

READ_TASK_CPUS = 0.5
_MOST_TASKS = 4096  # Ray Data plans each one up front; longer runs read several windows in a task
_idle: list[Scratch] = []  # what this process's last window was gathered in, for its next one


class StarvationError(UserError):
    """No batch came in time: says what to look at."""


@dataclass(frozen=True)
class WindowReader:
    """Reads windows for all ranks; what a Ray Data task takes along."""

    storage: Storage
    manifest: Manifest
    order: SampleOrder
    world_size: int
    flip: bool
    first_window: int
    cache: ChunkCache | None = None
    run: str = ""  # the label of what is counted

    def __call__(self, batch: Any) -> Iterator[dict[str, np.ndarray]]:
        """Windows counted from the first one, {"id": (N,)} -> N * world_size blocks of rows, rank by rank."""
        scratch = None
        for number in batch["id"]:
            scratch = _idle.pop() if _idle else Scratch()
            began, tries = time.monotonic(), retried.total()
            rows = self.rows(self.first_window + int(number), scratch)
            for name, amount in (
                ("ingest_samples", len(rows["row"])),
                ("ingest_seconds", time.monotonic() - began),
                ("ingest_retries", retried.total() - tries),
            ):
                prometheus.count(name, amount, self.run)
            share = len(rows["row"]) // self.world_size
            for start in range(0, len(rows["row"]), share):
                yield {name: column[start : start + share] for name, column in rows.items()}
        if scratch:  # not before, and so only the last window's: once the task has ended its blocks are surely stored
            _idle.append(scratch)

    def rows(self, window: int, scratch: Scratch) -> dict[str, np.ndarray]:
        """A window's rows, rank by rank: step, row, key, label (R,) and latents (R, C, H, W), which lie in `scratch`.

        Each chunk's samples go to their places as soon as it is there, while others are on their way.
        """
        order, manifest = self.order, self.manifest
        places = np.concatenate([rank_rows(order, self.world_size, rank) for rank in range(self.world_size)])
        keys = order.window_keys(window)[places]
        flips = order.window_flips(window)[places] if self.flip else np.zeros(len(keys), np.int64)
        chunks = order.chunks_of(keys)
        by_key = np.argsort(keys)
        bounds = np.searchsorted(keys[by_key], order.chunk_starts)  # rows of chunk c: by_key[bounds[c] : bounds[c + 1]]
        shape = (manifest.channels, *manifest.latent_size)
        size = 2 * int(np.prod(shape))
        gathered = scratch.take(len(keys) * size).view(f"V{size}")  # a latent as one item
        labels = np.empty(len(keys), np.int64)

        def gather(number: int, samples: Samples) -> None:
            chunk = chunks[number]
            mine = by_key[bounds[chunk] : bounds[chunk + 1]]
            at = keys[mine] - order.chunk_starts[chunk]
            labels[mine] = samples.labels[at]
            gathered[mine] = samples.items(at, flips[mine])

        each_chunk(self.storage, manifest, chunks, gather, self.cache)
        return {
            "step": window * order.window_steps + places // order.global_batch,
            "row": places % order.global_batch,
            "key": keys,
            "label": labels,
            "latents": gathered.view(np.float16).reshape(len(keys), *shape),
        }


class _Windows(Datasource):
    """The numbers of the windows, {"id": (N,)}. Ray Data's own `range` would be a task more for each window, and one
    that takes its turn with the reading."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._count

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> Any:
        return [self._task(numbers) for numbers in np.array_split(np.arange(self._count), parallelism)]

    @staticmethod
    def _task(numbers: np.ndarray) -> ReadTask:
        size = BlockMetadata(num_rows=len(numbers), size_bytes=numbers.nbytes, input_files=None, exec_stats=None)
        return ReadTask(lambda: [pa.table({"id": numbers})], size)


def sample_order(config: Config, manifest: Manifest) -> SampleOrder:
    """The order that a config and a data set define between them."""
    return SampleOrder(manifest.chunk_sizes, config.train.global_batch, config.data.window_samples, config.run.seed)


def training_dataset(config: Config, manifest: Manifest, start_step: int) -> ray.data.Dataset:
    """The windows that hold steps [start_step, train.steps), read ahead of training by data.read_tasks tasks."""
    order, train = sample_order(config, manifest), config.train
    first = order.window_of(start_step)
    windows = order.window_of(train.steps - 1) + 1 - first
    storage = Storage(config.data.latents)
    cache = ChunkCache(config.data.cache, int(config.data.cache_gb * 1e9)) if config.data.cache else None
    reader = WindowReader(storage, manifest, order, train.world_sizes[0], train.flip, first, cache, config.run.name)
    # The same of both: then they are one task.
    own = {"num_cpus": READ_TASK_CPUS, "concurrency": config.data.read_tasks}
    dataset = ray.data.read_datasource(_Windows(windows), override_num_blocks=min(windows, _MOST_TASKS), **own)
    # A task's blocks leave one by one, each as yielded: larger than the target, so that none is merged with the
    # next, and under 1.5 times the target, so that none is cut.
    dataset.context.target_max_block_size = int(0.8 * _block_bytes(reader))
    return dataset.map_batches(reader, batch_size=None, **own)


def _block_bytes(reader: WindowReader) -> int:
    return _window_bytes(reader.manifest, reader.order) // reader.world_size


def _window_bytes(manifest: Manifest, order: SampleOrder) -> int:
    """What one window takes in the object store, over all ranks: its columns, one flip of each sample."""
    row = 4 * 8 + manifest.channels * manifest.latent_size[0] * manifest.latent_size[1] * 2
    return row * order.window_steps * order.global_batch


def check_memory(config: Config, manifest: Manifest) -> None:
    """Raises ConfigError if the windows in flight cannot fit into the cluster's object store: it would spill to disk.

    In flight are those being read, one that waits, and one that is being trained on.
    """
    order = sample_order(config, manifest)
    window, have = _window_bytes(manifest, order), ray.cluster_resources().get("object_store_memory", 0)
    need = window * (config.data.read_tasks + 2)
    if need > have:
        raise ConfigError(
            f"data.window_samples: windows of {order.window_steps * order.global_batch:,} samples take "
            f"{window / 1e6:,.0f} MB, and {config.data.read_tasks + 2} are in flight (data.read_tasks + 2): "
            f"{need / 1e6:,.0f} MB, but the cluster's object store has {have / 1e6:,.0f} MB; lower data.window_samples "
            "or data.read_tasks, or give Ray more (--object-store-memory)"
        )


def object_store_use() -> tuple[float, float]:
    """Bytes of the cluster's object store that are taken, and all it has."""
    have = ray.cluster_resources().get("object_store_memory", 0.0)
    return have - ray.available_resources().get("object_store_memory", 0.0), have


def execution_options() -> ray.data.ExecutionOptions:
    """What the round robin of blocks rests on."""
    return ray.data.ExecutionOptions(preserve_order=True)


def rank_batches(shard: Any, config: Config, rank: int, start_step: int) -> Iterator[LatentBatch]:
    """A rank's Ray Data shard -> its batches of steps start_step, start_step + 1, ...

    Raises StarvationError if none comes for train.data_timeout_s seconds, AssertionError if Ray Data ever
    hands out other rows than the order says.
    """
    share = config.train.global_batch // config.train.world_sizes[0]
    wanted = np.arange(rank * share, (rank + 1) * share)
    stream = shard.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2)
    step = start_step
    for batch in _with_timeout(stream, config.train.data_timeout_s):
        found = int(batch["step"][0])
        if found < start_step:  # the window began before the checkpoint
            continue
        due = (batch["step"] == step).all() and np.array_equal(batch["row"], wanted)
        assert due, f"rank {rank} was handed step {found} where step {step} is due: Ray Data changed the order"
        yield LatentBatch(step, batch["row"], batch["latents"], batch["label"], batch["key"])
        step += 1


def _why_starving() -> str:
    """What keeps Ray Data from reading, as far as the cluster's resources tell."""
    have, free = ray.cluster_resources(), ray.available_resources()
    cpus, left = have.get("CPU", 0), free.get("CPU", 0)
    used, store = object_store_use()
    if left < READ_TASK_CPUS:
        return (
            f"of the cluster's {cpus:g} CPUs {left:g} are free, and a read task needs {READ_TASK_CPUS:g}: training "
            "workers or other jobs hold them; lower resources.worker_cpus, stop the other jobs, or add a CPU node"
        )
    if used > 0.95 * store:
        return (
            f"the object store is full ({used / 1e6:,.0f} of {store / 1e6:,.0f} MB); lower data.window_samples or "
            "data.read_tasks, or see what else keeps objects there (`ray memory`)"
        )
    return (
        f"{left:g} CPUs are free, so read tasks can run, and the storage does not answer or is too slow; see "
        "`dico-ray data verify`, storage.timeout_s and storage.retry_s, and Ray's log of the read tasks"
    )


def _with_timeout(stream: Any, seconds: float) -> Iterator[dict[str, np.ndarray]]:
    """The same items; an exception of the stream's is raised here."""
    items: queue.Queue[Any] = queue.Queue(maxsize=1)
    done = object()

    def pump() -> None:
        try:
            for item in stream:
                items.put(item)
        except BaseException as error:  # noqa: BLE001 - carried to the consumer, whole
            items.put(error)
        items.put(done)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            item = items.get(timeout=seconds)
        except queue.Empty:
            raise StarvationError(f"no batch for {seconds:g} s (train.data_timeout_s): {_why_starving()}") from None
        if item is done:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
