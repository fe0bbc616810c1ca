"""The stream in an object store much smaller than the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray._private.internal_api import memory_summary

from dico_ray import cluster, ingest
from dico_ray.bench import data as bench
from dico_ray.settings import build
from dico_ray.storage import Storage

pytestmark = pytest.mark.ray


def test_a_data_set_ten_times_the_object_store_streams_through(tmp_path: Path) -> None:
    """800 MB through a store of 80 MB (Ray's least is 75), without spilling to disk."""
    manifest = bench.synthetic(Storage(str(tmp_path / "latents")), 45_056, 4, 32, 10)
    config = build({
        "data": {"latents": str(tmp_path / "latents"), "window_samples": 1024, "read_tasks": 2},
        "model": {"num_classes": 10},
        "train": {"global_batch": 256, "steps": 176, "data_timeout_s": 60},
    })  # fmt: skip
    cluster.quiet()
    ray.init(
        address="local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False,
        logging_level="error",
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        ingest.check_memory(config, manifest)
        size = sum(shard.bytes for shard in manifest.shards)
        assert size >= 10 * ingest.object_store_use()[1]
        dataset = ingest.training_dataset(config, manifest, 0)
        dataset.context.execution_options = ingest.execution_options()
        (shard,) = dataset.streaming_split(1, equal=True)
        rows = sum(len(b.labels) for b in ingest.rank_batches(shard, config, 0, 0))
        summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)  # others may run
    finally:
        ray.shutdown()
    assert rows == manifest.count
    assert "Plasma memory usage" in summary
    assert "Spilled" not in summary
