"""The stream: latent shards -> Ray Data -> one rank's batches, in the global order of data/order.py.

Ray Data's task for a window reads its chunks, picks each sample's flip and hands out one block a rank, in rank
order. Blocks of equal rows in preserved order make `streaming_split(n, equal=True)` a strict round robin, so
rank r gets its blocks of every window. Each row says which step and place it belongs to; the consumer checks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data

from dico_ray.config import Config, UserError
from dico_ray.data.cache import ChunkCache
from dico_ray.data.order import SampleOrder, rank_rows
from dico_ray.data.reader import Scratch, read_chunks
from dico_ray.data.shards import LatentBatch, Manifest
from dico_ray.storage import Storage

READ_TASK_CPUS = 0.5
_MOST_TASKS = 4096  # Ray Data plans each one up front; longer runs read several windows in a task
_scratch: list[Scratch] = []  # what a worker process's last window was read into, for its next one


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

    def __call__(self, batch: Any) -> Iterator[dict[str, np.ndarray]]:
        """Windows counted from the first one, {"id": (N,)} -> N * world_size blocks of rows, rank by rank."""
        for number in batch["id"]:
            yield from self.blocks(self.first_window + int(number))

    def blocks(self, window: int) -> Iterator[dict[str, np.ndarray]]:
        """One block a rank: step, row, key, label (R,) and latents (R, C, H, W), R = steps * rows of a rank."""
        keys = self.order.window_keys(window)
        flips = self.order.window_flips(window) if self.flip else np.zeros(len(keys), np.int64)
        chunks = self.order.chunks_of(keys)
        scratch = _scratch.pop() if _scratch else Scratch()
        samples = read_chunks(self.storage, self.manifest, chunks, self.cache, scratch)
        # Chunks are ascending, so the keys that are held are sorted, and each is found by bisection.
        places = np.searchsorted(np.concatenate([self.order.chunk_keys(chunk) for chunk in chunks]), keys)
        steps = window * self.order.window_steps + np.arange(len(keys)) // self.order.global_batch
        rows = np.arange(len(keys)) % self.order.global_batch
        for rank in range(self.world_size):
            mine = rank_rows(self.order, self.world_size, rank)
            yield {
                "step": steps[mine],
                "row": rows[mine],
                "key": keys[mine],
                "label": samples.labels[places[mine]],
                "latents": samples.pick(places[mine], flips[mine]),
            }
        _scratch.append(scratch)


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
    reader = WindowReader(storage, manifest, order, train.num_workers, train.flip, first, cache)
    dataset = ray.data.range(windows, override_num_blocks=min(windows, _MOST_TASKS))
    # A task's blocks leave one by one, each as yielded: larger than the target, so that none is merged with the
    # next, and under 1.5 times the target, so that none is cut.
    dataset.context.target_max_block_size = int(0.8 * _block_bytes(reader))
    return dataset.map_batches(
        reader,
        batch_size=None,
        num_cpus=READ_TASK_CPUS,
        concurrency=config.data.read_tasks,
    )


def _block_bytes(reader: WindowReader) -> int:
    manifest = reader.manifest
    row = 4 * 8 + manifest.channels * manifest.latent_size[0] * manifest.latent_size[1] * 2
    return row * reader.order.window_steps * reader.order.global_batch // reader.world_size


def execution_options() -> ray.data.ExecutionOptions:
    """What the round robin of blocks rests on."""
    return ray.data.ExecutionOptions(preserve_order=True)


def rank_batches(shard: Any, config: Config, rank: int, start_step: int) -> Iterator[LatentBatch]:
    """A rank's Ray Data shard -> its batches of steps start_step, start_step + 1, ...

    Raises StarvationError if none comes for train.data_timeout_s seconds, AssertionError if Ray Data ever
    hands out other rows than the order says.
    """
    share = config.train.global_batch // config.train.num_workers
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
            raise StarvationError(
                f"no batch for {seconds:g} s (train.data_timeout_s): Ray Data's read tasks are not running or the "
                "storage hangs; see that CPUs are left for them (resources.worker_cpus) and the storage answers"
            ) from None
        if item is done:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
