"""The stream hands out the global order of data/order.py, whatever the number of workers."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dico_ray import ingest
from dico_ray.config import Config, ConfigError
from dico_ray.data.order import rank_rows
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.settings import build
from dico_ray.storage import Storage
from tests.conftest import write_latents

pytestmark = pytest.mark.ray


def _config(latents: Path, workers: int, steps: int, data: Any = None, train: Any = None, seed: int = 0) -> Config:
    return build({
        "run": {"seed": seed},
        "data": {"latents": str(latents), "window_samples": 70, "read_tasks": 2, **(data or {})},
        "model": {"latent_size": 8, "num_classes": 10},
        "train": {"global_batch": 24, "steps": steps, "num_workers": workers, "data_timeout_s": 60, **(train or {})},
    })  # fmt: skip


def _consume(latents: Path, workers: int, start: int, steps: int, **own: Any) -> list[dict[int, dict[str, np.ndarray]]]:
    """What each of `workers` consumers receives: by rank, by step. With a seed, readers and consumers dawdle."""
    config = _config(latents, workers, steps, **own)
    dataset = ingest.training_dataset(config, Manifest.load(Storage(str(latents))), start)
    dataset.context.execution_options = ingest.execution_options()

    seed = config.run.seed
    if seed:
        dataset = dataset.map_batches(_dawdle, batch_size=None)

    @ray.remote(num_cpus=0)
    def consume(shard: Any, rank: int) -> dict[int, dict[str, np.ndarray]]:
        found = {}
        for b in ingest.rank_batches(shard, config, rank, start):
            found[b.step] = {"keys": b.keys, "rows": b.rows, "latents": b.latents, "labels": b.labels}
            if seed and random.Random(seed * 7 + b.step * 5 + rank).random() < 0.1:
                time.sleep(0.05)
        return found

    splits = dataset.streaming_split(workers, equal=True)
    return ray.get([consume.remote(split, rank) for rank, split in enumerate(splits)])


def _dawdle(batch: Any) -> Any:
    if random.random() < 0.3:
        time.sleep(random.random() * 0.1)
    return batch


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("workers", "start"), [(1, 0), (2, 0), (3, 7), (4, 13)])
def test_every_world_size_and_start_sees_the_same_steps(latents: Path, workers: int, start: int) -> None:
    steps = 30  # 720 samples of a data set of 200: three and a half epochs
    order = ingest.sample_order(_config(latents, 1, steps), Manifest.load(Storage(str(latents))))
    windows = range(-(-steps // order.window_steps))
    expected = np.concatenate([order.window_keys(w) for w in windows]).reshape(-1, 24)
    received = _consume(latents, workers, start, steps)
    for step in range(start, steps):
        parts = [received[rank][step] for rank in range(workers)]
        assert np.concatenate([p["rows"] for p in parts]).tolist() == list(range(24))
        keys = np.concatenate([p["keys"] for p in parts])
        assert keys.tolist() == expected[step].tolist()
    for rank in range(workers):
        assert min(received[rank]) == start


@pytest.mark.usefixtures("local_ray")
def test_two_workers_rows_are_disjoint_and_their_union_is_the_one_worker_batch(latents: Path) -> None:
    one, two = _consume(latents, 1, 0, 12)[0], _consume(latents, 2, 0, 12)
    for step in range(12):
        first, second = (set(zip(p[step]["keys"], p[step]["rows"], strict=True)) for p in two)
        assert not first & second
        assert first | second == set(zip(one[step]["keys"], one[step]["rows"], strict=True))
        # The same rows hold the same flip of the same sample.
        both = np.concatenate([p[step]["latents"] for p in two])
        assert np.array_equal(both, one[step]["latents"])


@pytest.mark.usefixtures("local_ray")
def test_an_epoch_holds_every_sample_once_and_its_own_latents(latents: Path) -> None:
    received = _consume(latents, 1, 0, 30)[0]
    keys = np.concatenate([received[s]["keys"] for s in range(30)])
    for epoch in range(3):
        assert sorted(keys[epoch * 200 : (epoch + 1) * 200]) == list(range(200))
    labels = np.concatenate([received[s]["labels"] for s in range(30)])
    means = np.concatenate([received[s]["latents"] for s in range(30)]).astype(np.float64).mean((1, 2, 3))
    assert np.abs(means - (labels / 5 - 1)).max() < 0.15  # the latents tell their label


@pytest.mark.usefixtures("local_ray")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_an_interrupted_run_repeats_and_skips_nothing_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Sizes that do not divide; readers and workers that are slow at random; another world size after the break."""
    workers = data.draw(st.sampled_from([(1, 2), (2, 3), (3, 1), (4, 2), (2, 4)]), "workers before and after")
    global_batch = 12 * data.draw(st.integers(1, 3), "global batch / 12")
    folder = tmp_path_factory.mktemp("odd")
    samples, shards = data.draw(st.integers(7, 41), "samples"), data.draw(st.integers(1, 3), "shards")
    manifest = write_latents(folder, shards, samples, data.draw(st.integers(1, 13), "chunk"))
    count = samples * shards
    steps = -(-2 * count // global_batch) + 2  # more than two epochs
    stop = data.draw(st.integers(1, steps - 1), "stop")
    window = data.draw(st.integers(1, 2 * count), "window")
    own = {"window_samples": window, "read_tasks": data.draw(st.integers(1, 3), "read tasks")}
    train = {"global_batch": global_batch}
    first = _consume(folder, workers[0], 0, stop, data=own, train=train, seed=count)
    second = _consume(folder, workers[1], stop, steps, data=own, train=train, seed=count)
    order = ingest.sample_order(_config(folder, 1, steps, data=own, train=train, seed=count), manifest)
    windows = range(-(-steps // order.window_steps))
    due = np.concatenate([order.window_keys(w) for w in windows])[: steps * global_batch]
    found = [
        np.concatenate([ranks[rank][step]["keys"] for rank in range(len(ranks))])
        for ranks, span in ((first, range(stop)), (second, range(stop, steps)))
        for step in span
    ]
    assert np.concatenate(found).tolist() == due.tolist()
    for epoch in range(2):
        assert sorted(due[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_task_of_several_windows_keeps_their_rows_apart(latents: Path, ranks: int) -> None:
    storage = Storage(str(latents))
    manifest = Manifest.load(storage)
    order = ingest.sample_order(_config(latents, 1, 30), manifest)
    held = read_chunks(storage, manifest, range(len(manifest.chunks)))
    for first in (0, 2):  # the second task takes the first one's memory
        reader = ingest.WindowReader(storage, manifest, order, ranks, True, first)
        blocks = list(reader({"id": np.array([0, 1])}))
        assert len(blocks) == 2 * ranks
        for i, block in enumerate(blocks):
            window, mine = first + i // ranks, rank_rows(order, ranks, i % ranks)
            keys, flips = order.window_keys(window)[mine], order.window_flips(window)[mine]
            assert block["key"].tolist() == keys.tolist()
            assert block["label"].tolist() == held.labels[keys].tolist()
            assert block["latents"].tobytes() == held.pick(keys, flips).tobytes()


@pytest.mark.usefixtures("local_ray")
def test_a_stream_without_cpus_says_who_has_them(latents: Path) -> None:
    """Another job takes every CPU after the run was found to fit."""

    @ray.remote(num_cpus=4)
    class Hog:
        def here(self) -> bool:
            return True

    hog: Any = Hog.remote()
    assert ray.get(hog.here.remote())
    try:
        with pytest.raises(ingest.StarvationError, match=r"of the cluster's 4 CPUs 0 are free.*worker_cpus"):
            _consume(latents, 1, 0, 3, train={"data_timeout_s": 3})
    finally:
        ray.kill(hog)


@pytest.mark.usefixtures("local_ray")
def test_a_storage_that_hangs_is_told_from_a_lack_of_cpus() -> None:
    def never() -> Any:
        time.sleep(30)
        yield {}

    with pytest.raises(ingest.StarvationError, match=r"train\.data_timeout_s.*storage does not answer"):
        next(ingest._with_timeout(never(), 0.2))


@pytest.mark.usefixtures("local_ray")
def test_windows_beyond_the_object_store_are_refused(latents: Path) -> None:
    config = _config(latents, 1, 3, data={"window_samples": 10**9})
    with pytest.raises(ConfigError, match=r"data\.window_samples: windows of 1,000,000,0.* the cluster's object store"):
        ingest.check_memory(config, Manifest.load(Storage(str(latents))))


def test_an_error_in_the_stream_reaches_the_consumer() -> None:
    def broken() -> Any:
        yield {"step": 0}
        raise OSError("the shard is gone")

    items = ingest._with_timeout(broken(), 5)
    assert next(items) == {"step": 0}
    with pytest.raises(OSError, match="the shard is gone"):
        next(items)
