"""`dico-ray bench data`: rows/s of the stream beside what else reads the same shards, in one run.

Every reader first goes through the data once untimed (processes started, pages cached), then again and again for at
least five seconds, timed from the first call to the last row. The stream's epochs are one stream of a million rows
or more, as in training: its start, some two seconds of Ray Data's, is in its figure once. Before that it runs once
untimed, while its memory is watched. From an object store the rivals are the libraries by themselves: the one that
storage.library names, and the other.
"""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from json import dumps
from typing import Any

import numpy as np
import ray

from dico_ray import cluster, ingest
from dico_ray.bench.folders import bench_folder
from dico_ray.config import Config, ConfigError
from dico_ray.data.order import SampleOrder
from dico_ray.data.shards import MANIFEST, Manifest, Shard, sample_bytes, write_shard
from dico_ray.progress import Progress
from dico_ray.settings import build, merge
from dico_ray.storage import Storage

_BATCH = 256
_CLASSES = 1000
_SHARD_SAMPLES = 4096
_CHUNK_BYTES = 4 * 2**20
_RANGE_REQUESTS = 8
_LIBRARIES = ("fsspec", "pyarrow")  # of storage.library
_STREAM_SAMPLES = 2**20  # at least so many, in whole epochs
_LEAST_SECONDS = 5.0


def main(config: Config, *, verbose: bool, samples: int, folder: str, rivals: bool, json: str) -> None:
    """Makes synthetic shards of the model's latent size (32x32x4: 16 KB a sample) and prints the table.

    samples: how many. folder: where to make them (kept, used again); unset: a temporary folder. rivals: also
    time the other readers. json: a file for the figures. Raises ConfigError for a folder that holds another set.
    """
    with bench_folder(folder) as place:
        storage = Storage(place)
        manifest = synthetic(
            storage, samples, config.model.in_channels, config.model.latent_size, config.model.num_classes
        )
        config = _stream_config(config, storage, manifest)
        cluster.connect(verbose)
        figures = measure(config, manifest, storage, rivals)
    order, labels = ingest.sample_order(config, manifest), sorted_labels(manifest)
    figures["mixing_sorted"] = mixing(order, labels)
    figures["mixing_encoded"] = mixing(order, np.random.default_rng(1).permutation(labels))
    _tell(figures)
    if json:
        folder, name = os.path.split(os.path.abspath(json))
        Storage(folder).write(name, dumps(figures, indent=1).encode())


def synthetic(storage: Storage, samples: int, channels: int, side: int, classes: int) -> Manifest:
    """A data set of random latents, labels in ascending order (the worst case for mixing), written once."""
    if storage.exists(MANIFEST):
        manifest = Manifest.load(storage)
        if (manifest.count, manifest.channels, manifest.latent_size) != (samples, channels, (side, side)):
            raise ConfigError(f"--folder {storage.url} holds other shards; name another folder, or remove it")
        return manifest
    chunk = max(1, _CHUNK_BYTES // sample_bytes(channels, side, side))
    pool = np.random.default_rng(0).standard_normal((_SHARD_SAMPLES, 2, channels, side, side)).astype(np.float16)
    labels = np.arange(samples) * classes // samples

    def make(first: int) -> Shard:
        count = min(_SHARD_SAMPLES, samples - first)
        keys = [f"{i:09d}" for i in range(first, first + count)]
        latents = pool[:count].copy()
        latents.reshape(count, -1)[:, 0] = np.arange(first, first + count) % 2048  # no two shards alike
        return write_shard(
            storage, f"shard-{first // _SHARD_SAMPLES:05d}.tar", keys, latents, labels[first : first + count].tolist(),
            chunk,
        )  # fmt: skip

    shards = []
    firsts = range(0, samples, _SHARD_SAMPLES)
    with Progress("make shards", samples, "samples") as progress:
        for first in firsts:
            shards.append(make(first))
            progress.update(min(samples, first + _SHARD_SAMPLES))
    manifest = Manifest(
        tuple(shards), chunk, sample_bytes(channels, side, side), channels, (side, side),
        tuple(str(i) for i in range(classes)), 8 * side, {"vae": "synthetic"}, {},
    )  # fmt: skip
    storage.write(MANIFEST, manifest.to_json().encode())
    return manifest


def _stream_config(config: Config, storage: Storage, manifest: Manifest) -> Config:
    """One worker that takes all epochs."""
    epochs = max(1, _STREAM_SAMPLES // manifest.count)
    train = {"global_batch": _BATCH, "num_workers": 1, "steps": epochs * manifest.count // _BATCH, "warmup_steps": 0}
    return build(merge(config.model_dump(), {"data": {"latents": storage.url}, "train": train}))


def measure(config: Config, manifest: Manifest, storage: Storage, rivals: bool) -> dict[str, Any]:
    """Rows/s of each reader, their ratios, and the stream's memory."""
    shards = [storage.path(shard.name) for shard in manifest.shards]
    readers: dict[str, Callable[[], int]] = {"stream": lambda: stream_rows(config, manifest)}
    if storage.is_local:
        readers["plain_read"] = lambda: plain_read_rows(storage, manifest)
        if rivals:
            readers["webdataset_loader"] = _webdataset_rows(shards)
            readers["read_webdataset"] = lambda: read_webdataset_rows(shards)
    else:
        readers |= {f"{name}_alone": _library_rows(storage, manifest, name) for name in _libraries(storage, rivals)}
    rates, memory = {}, Memory()
    for name, reader in readers.items():
        with memory if name == "stream" else nullcontext():  # watching costs time: not in the timed pass
            reader()
        began, rows = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < _LEAST_SECONDS:
            rows += reader()
        rates[name] = rows / seconds
    ratios = {f"ratio_{name}": rates["stream"] / rate for name, rate in rates.items() if name != "stream"}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs", "storage": storage.url,
        "samples": manifest.count, "sample_bytes": manifest.sample_bytes,
        "rows_per_s": rates, **ratios, "peak_memory_mb": memory.peak / 1e6,
        "object_store_mb": ray.cluster_resources().get("object_store_memory", 0) / 1e6,
        "object_store_peak_mb": memory.object_store_peak / 1e6,
        "versions": {"ray": ray.__version__, "python": platform.python_version()},
    }  # fmt: skip


def stream_rows(config: Config, manifest: Manifest) -> int:
    """The stream as a training worker takes it: through Ray Data's split, batch by batch."""
    dataset = ingest.training_dataset(config, manifest, 0)
    dataset.context.execution_options = ingest.execution_options()
    (shard,) = dataset.streaming_split(1, equal=True)
    return sum(len(batch.labels) for batch in ingest.rank_batches(shard, config, 0, 0))


def plain_read_rows(storage: Storage, manifest: Manifest) -> int:
    """The same bytes, file by file, and nothing done with them."""
    for shard in manifest.shards:
        with open(storage.path(shard.name), "rb", buffering=0) as file:
            assert len(file.read()) == shard.bytes
    return manifest.count


def _libraries(storage: Storage, rivals: bool) -> tuple[str, ...]:
    return _LIBRARIES if rivals else (storage.settings.library,)


def _library_rows(storage: Storage, manifest: Manifest, name: str) -> Callable[[], int]:
    library = storage.another_library(name)
    return lambda: library_read_rows(storage, manifest, library)


def library_read_rows(storage: Storage, manifest: Manifest, library: Any) -> int:
    """The ranges that the stream reads, as many at a time, by the library alone, which opens each shard once."""

    def read(shard: Shard) -> None:
        path, first = storage.path(shard.name), 0
        file = library.open_input_file(path) if hasattr(library, "open_input_file") else None
        step = manifest.chunk_samples * manifest.sample_bytes
        for first in range(0, shard.count * manifest.sample_bytes, step):
            stop = min(first + step, shard.count * manifest.sample_bytes)
            data = file.read_at(stop - first, first) if file else library.cat_file(path, start=first, end=stop)
            assert len(data) == stop - first

    with ThreadPoolExecutor(_RANGE_REQUESTS) as pool:
        list(pool.map(read, manifest.shards))
    return manifest.count


def _webdataset_rows(paths: list[str]) -> Callable[[], int]:
    """The package webdataset behind a torch DataLoader with two worker processes, batched in them."""
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    stages: Any = WebDataset(paths, shardshuffle=False)
    dataset = stages.decode().to_tuple("latent.npy", "cls").batched(_BATCH)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=min(2, len(paths)),
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    return lambda: sum(len(labels) for _, labels in loader)


def read_webdataset_rows(paths: list[str]) -> int:
    """ray.data.read_webdataset, its own decoding, into batches."""
    dataset = ray.data.read_webdataset(paths)
    return sum(len(batch["cls"]) for batch in dataset.iter_batches(batch_size=_BATCH, batch_format="numpy"))


@dataclass
class Memory:
    """Peak of what this process and Ray's hold (proportional set size), watched while the body runs."""

    peak: int = 0
    object_store_peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended
                    continue
            self.peak = max(self.peak, total)
            held, free = (f().get("object_store_memory", 0) for f in (ray.cluster_resources, ray.available_resources))
            self.object_store_peak = max(self.object_store_peak, int(held - free))


def sorted_labels(manifest: Manifest) -> np.ndarray:
    """Labels that `synthetic` gave, by key."""
    return np.arange(manifest.count) * len(manifest.classes) // manifest.count


def mixing(order: SampleOrder, labels: np.ndarray) -> dict[str, float]:
    """How well the order mixes, over one epoch of the data set it is for.

    chunk_spread: standard deviation of the places of one chunk's samples, over that of a perfect shuffle.
    label_entropy: mean entropy of a batch's labels, over that of batches of a perfect shuffle.
    """
    windows = -(-order.epoch_samples // (order.window_steps * order.global_batch))
    keys = np.concatenate([order.window_keys(window) for window in range(windows)])[: order.epoch_samples]
    place = np.empty(order.epoch_samples)
    place[keys] = np.arange(order.epoch_samples)
    spreads = [np.std(place[order.chunk_keys(chunk)]) for chunk in range(len(order.chunk_sizes))]
    perfect = np.random.default_rng(0).permutation(labels)
    return {
        "chunk_spread": float(np.mean(spreads) / (order.epoch_samples / math.sqrt(12))),
        "label_entropy": _batch_entropy(labels[keys], order.global_batch) / _batch_entropy(perfect, order.global_batch),
    }


def _batch_entropy(labels: np.ndarray, batch: int) -> float:
    batches = labels[: len(labels) // batch * batch].reshape(-1, batch)
    shares = [np.unique(b, return_counts=True)[1] / batch for b in batches]
    return float(np.mean([-(p * np.log(p)).sum() for p in shares]))


def _tell(figures: dict[str, Any]) -> None:
    print(f"\n{figures['samples']:,} samples of {figures['sample_bytes']:,} bytes from {figures['storage']}")
    print(f"on {figures['machine']}")
    for name, rate in figures["rows_per_s"].items():
        ratio = figures.get(f"ratio_{name}")
        print(f"  {name:20}{rate:10,.0f} rows/s" + (f"   the stream is {ratio:.2f} times that" if ratio else ""))
    print(
        f"peak memory {figures['peak_memory_mb']:,.0f} MB over all processes; object store "
        f"{figures['object_store_mb']:,.0f} MB, of which used at most {figures['object_store_peak_mb']:,.0f}"
    )
    print("mixing, against a perfect shuffle of the epoch:")
    for name, what in (("mixing_encoded", "shuffled by encode"), ("mixing_sorted", "sorted by label")):
        found = figures[name]
        print(
            f"  shards {what:20} spread of a chunk {found['chunk_spread']:.2f}, "
            f"entropy of a batch's labels {found['label_entropy']:.3f}"
        )
