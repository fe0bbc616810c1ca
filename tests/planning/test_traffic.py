"""Collectives, checkpoints and requests against hand calculation, and against the order that training reads in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config
from dico_ray.data.order import SampleOrder, chunk_sizes
from dico_ray.data.shards import sample_bytes
from dico_ray.planning.traffic import bandwidth, checkpoint, exchange, reading, shard_bytes
from dico_ray.recipes import resolve


def planned(hardware: dict[str, Any] | None = None, **train: Any) -> Config:
    return resolve("dico-h-256", None, {"train": train, "hardware": hardware or {}})


def test_shard_bytes_are_the_format_s() -> None:
    config = resolve("dico-xl-512", None, {})
    assert shard_bytes(config, 10) == 10 * sample_bytes(4, 64, 64)
    assert sample_bytes(4, 32, 32) == 3 * 512 + 512 * 33  # 16 KB of values and a .npy header


def test_bandwidth_is_the_slowest_on_the_way() -> None:
    config = planned({"link_gb_s": 400, "network_gbit_s": 100, "link_share": 0.5})
    assert bandwidth(config, config.cluster.gpus_per_node) == 200e9
    assert bandwidth(config, 16) == 50e9  # eight networks of 12.5 GB/s, half of it
    fast = planned({"link_gb_s": 400, "network_gbit_s": 800, "link_share": 1})
    assert bandwidth(fast, 16) == 400e9


def test_bytes_sent_by_stage() -> None:
    """ZeRO's volumes (arXiv 1910.02054, section 7), as DeepSpeed sends them: gradients in fp32, weights in bf16."""
    count, part = parameter_count(planned().model), 3 / 4
    sent = [exchange(planned(zero_stage=stage), 4, micros=5, compute_s=1.0).sent / count / part for stage in range(4)]
    assert sent == pytest.approx([2 * 2, 2 * 4 + 2, 5 * 4 + 2, 5 * (2 + 2 + 4)])
    offloaded = exchange(planned(zero_stage=2, offload=True), 4, micros=5, compute_s=1.0).sent / count / part
    assert offloaded == pytest.approx(5 * 2 * 4 + 2)
    fp32 = [exchange(planned(zero_stage=stage, precision="fp32"), 4, 1, 1.0).sent / count / part for stage in range(4)]
    assert fp32 == pytest.approx([8, 8 + 4, 4 + 4, 4 + 4 + 4])


@settings(max_examples=60)
@given(
    stage=st.integers(0, 3), workers=st.sampled_from([1, 2, 8, 64, 1024]), micros=st.integers(1, 8),
    compute=st.floats(0, 20),
)  # fmt: skip
def test_what_is_hidden_was_sent(stage: int, workers: int, micros: int, compute: float) -> None:
    config = planned(zero_stage=stage)
    moved = exchange(config, workers, micros, compute)
    assert 0 <= moved.exposed <= moved.seconds * (1 + 1e-9)
    if stage < 2 or workers == 1:
        assert moved.exposed == moved.seconds  # nothing hides them
    else:
        assert exchange(config, workers, micros, compute + 1).exposed <= moved.exposed
    if workers > 1:
        assert moved.seconds >= moved.sent / bandwidth(config, workers)


def test_checkpoints_by_the_measured_rate() -> None:
    """Of DiCo-H on one worker the measured figures come out; on 64 each has its part."""
    one, many = checkpoint(planned(), 1), checkpoint(planned(), 64)
    assert one.nbytes == 16 * parameter_count(planned().model)
    assert (one.stall_s, one.least_s, one.most_s) == pytest.approx((0.3, 11, 16), rel=0.001)
    assert many.part == one.nbytes / 64
    assert many.most_s == pytest.approx(one.most_s / 64)
    profiles = checkpoint(planned(ema_profiles=(0.05, 0.1)), 1)
    assert profiles.nbytes / one.nbytes == 6 / 4


def test_requests_are_those_of_the_order() -> None:
    """Chunks that windows of a data set read, by training's own order: the forecast is an upper bound, within 5%."""
    config = resolve("dico-b-256", None, {})
    chunk = config.encode.chunk_bytes // sample_bytes(4, 32, 32)
    order = SampleOrder(chunk_sizes([4096] * 50, chunk), config.train.global_batch, config.data.window_samples, seed=1)
    windows = range(10)
    chunks = [order.chunks_of(order.window_keys(window)) for window in windows]
    rows = order.window_steps * order.global_batch
    told = reading(config, images_per_s=rows)  # a window a second
    read = sum(len(of_window) for of_window in chunks) / len(windows)
    nbytes = (
        sum(order.chunk_sizes[c] for of_window in chunks for c in of_window) / len(windows) * sample_bytes(4, 32, 32)
    )
    assert told.nbytes == pytest.approx(nbytes, rel=0.05)
    assert told.requests == pytest.approx(read, rel=0.05)
    assert told.blocks == rows * (32 + 2 * 4 * 32 * 32)
    assert told.held == told.blocks * (config.data.read_tasks + 2)
