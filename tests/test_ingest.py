"""The stream hands out the global order of data/order.py, whatever the number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from dico_ray import ingest
from dico_ray.config import Config
from dico_ray.data.shards import Manifest
from dico_ray.settings import build
from dico_ray.storage import Storage

pytestmark = pytest.mark.ray


def _config(latents: Path, workers: int, steps: int) -> Config:
    return build(
        {
            "data": {"latents": str(latents), "window_samples": 70, "read_tasks": 2},
            "model": {"latent_size": 8, "num_classes": 10},
            "train": {"global_batch": 24, "steps": steps, "num_workers": workers, "data_timeout_s": 60},
        }
    )


def _consume(latents: Path, workers: int, start: int, steps: int) -> list[dict[int, dict[str, np.ndarray]]]:
    """What each of `workers` consumers receives: by rank, by step."""
    config = _config(latents, workers, steps)
    dataset = ingest.training_dataset(config, Manifest.load(Storage(str(latents))), start)
    dataset.context.execution_options = ingest.execution_options()

    @ray.remote(num_cpus=0)
    def consume(shard: Any, rank: int) -> dict[int, dict[str, np.ndarray]]:
        batches = ingest.rank_batches(shard, config, rank, start)
        return {b.step: {"keys": b.keys, "rows": b.rows, "latents": b.latents, "labels": b.labels} for b in batches}

    splits = dataset.streaming_split(workers, equal=True)
    return ray.get([consume.remote(split, rank) for rank, split in enumerate(splits)])


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


def test_a_stream_that_never_comes_is_named() -> None:
    def never() -> Any:
        import time

        time.sleep(30)
        yield {}

    with pytest.raises(ingest.StarvationError, match=r"train\.data_timeout_s"):
        next(ingest._with_timeout(never(), 0.2))


def test_an_error_in_the_stream_reaches_the_consumer() -> None:
    def broken() -> Any:
        yield {"step": 0}
        raise OSError("the shard is gone")

    items = ingest._with_timeout(broken(), 5)
    assert next(items) == {"step": 0}
    with pytest.raises(OSError, match="the shard is gone"):
        next(items)
