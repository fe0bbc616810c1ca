"""A step's parts, the ladder to 1,024 GPUs, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import measured
from dico_ray.arithmetic import training_flops
from dico_ray.config import Config
from dico_ray.planning.scaling import Point, grown, ladder, limit, step
from dico_ray.recipes import resolve


def planned(
    recipe: str = "dico-h-256", hardware: dict[str, Any] | None = None, kernels: str = "auto", **train: Any
) -> Config:  # fmt: skip
    return resolve(recipe, None, {"train": train, "hardware": hardware or {}, "model": {"kernels": kernels}})


def of_step(config: Config, workers: int, batch: int | None = None) -> Point:
    point = step(config, workers, batch)
    assert point
    return point


def test_the_measured_run_is_foreseen() -> None:
    """DiCo-H on one H100, 1024 images in 16 micro-batches of 64: 4.5 s a step and 225 images/s, within 2%."""
    point = of_step(planned(num_workers=1, micro_batch=64, kernels="torch", cuda_graphs=False), 1)
    assert (point.micro_batch, point.accumulation, point.basis) == (64, 16, "measured")
    assert point.step_s == pytest.approx(4.5, rel=0.02)
    assert point.images_per_s == pytest.approx(225, rel=0.02)
    assert point.mfu == pytest.approx(263 / 989, rel=0.02)


def test_two_gpus_measured_are_foreseen_within_a_twentieth() -> None:
    """DiCo-H on two H100s, from one H100's row: 541 images/s were measured."""
    row = next(row for row in measured.rows() if row.what == measured.WHOLE_FUSED and row.gpus == 2)
    assert row.micro_batch
    assert row.images_per_s
    point = of_step(planned(num_workers=2, micro_batch=row.micro_batch), 2)
    assert point.images_per_s == pytest.approx(2 * row.images_per_s, rel=0.05)


def test_two_gpus_measured_lie_in_the_range() -> None:
    """An older version's run on two H200s was slower than the forecast, which is told as a range: it holds that run."""
    row = next(row for row in measured.rows() if row.what == measured.WHOLE and row.gpus == 2)
    assert row.micro_batch
    assert row.images_per_s
    config = planned(hardware={"gpu": row.gpu}, kernels="torch", num_workers=2, micro_batch=row.micro_batch)
    point = of_step(config, 2)
    assert point.least_s <= point.global_batch / (2 * row.images_per_s) <= point.most_s
    assert point.basis == "extrapolated"


@settings(max_examples=40, deadline=None)
@given(
    recipe=st.sampled_from(["dico-s-256", "dico-xl-256", "dico-h-256", "dico-xl-512"]),
    stage=st.integers(0, 3),
    workers=st.sampled_from([1, 2, 8, 64, 256]),
)
def test_parts_make_the_step(recipe: str, stage: int, workers: int) -> None:
    config = planned(recipe, kernels="torch" if stage == 3 else "auto", zero_stage=stage)
    p = of_step(config, workers)
    parts = {"work": p.work_s, "launches": p.launches_s, "communication": p.communication_s, "update": p.update_s}
    assert sum(parts.values()) == pytest.approx(p.step_s)
    assert p.micro_batch * p.accumulation * workers == p.global_batch == config.train.global_batch
    assert p.images_per_s == pytest.approx(p.global_batch / p.step_s)
    assert p.mfu == pytest.approx(p.images_per_s / workers * training_flops(config.model) / 989e12)
    assert parts[p.binds] == max(parts.values())
    assert p.least_s <= p.step_s <= p.most_s


def test_the_ladder_holds_the_run_s_own_workers_and_ends_at_the_batch() -> None:
    sizes = [point.workers for point in ladder(planned("dico-s-256"))]
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert 96 in [point.workers for point in ladder(planned("dico-h-256", global_batch=1152, num_workers=96))]
    assert [point.workers for point in ladder(planned("dico-h-256"))][-1] == 1024


def test_more_gpus_are_never_slower_and_never_better_than_in_proportion() -> None:
    """Of fused blocks twice the micro-batch fits on two GPUs, which is better than in proportion.

    At stage 2 up to 128: with four images a GPU the many owners' sums, each by itself, take longer than the passes.
    """
    for stage, most in ((1, 1024), (2, 128)):
        points = [point for point in ladder(planned(zero_stage=stage, kernels="torch")) if point.workers <= most]
        assert points[-1].workers == most
        for low, high in pairwise(points):
            assert 1 < high.images_per_s / low.images_per_s <= 2.0001
            assert high.efficiency < low.efficiency


def test_a_batch_that_grows_keeps_gpus_at_work() -> None:
    points = grown(planned(zero_stage=2))
    assert points[-1].workers == 1024
    assert all(point.accumulation == 1 and point.global_batch == point.workers * point.micro_batch for point in points)
    assert points[-1].images_per_s > 900 * points[0].images_per_s


def test_small_networks_stop_at_launches_and_slow_networks_at_collectives() -> None:
    small, why = limit(ladder(planned("dico-s-256")))
    assert "launches" in why
    large, _ = limit(ladder(planned("dico-h-256")))
    assert small.workers < large.workers
    slow, why = limit(ladder(planned("dico-h-256", {"network_gbit_s": 1})))
    assert slow.workers == 8  # a node: beyond it the network is a hundredth of its links
    assert "collectives" in why


def test_the_limit_is_where_doubling_gives_less_than_half_again() -> None:
    point = of_step(planned(), 64)

    def rates(*found: tuple[int, float]) -> list[Point]:
        return [replace(point, workers=size, images_per_s=rate, global_batch=1024) for size, rate in found]

    last, why = limit(rates((1, 100), (2, 190), (4, 280), (8, 500)))
    assert last.workers == 2
    assert "4 GPUs would give 1.47 times its rate" in why
    assert limit(rates((1, 100), (2, 190), (3, 245), (4, 320)))[0].workers == 4  # 1.29 for half as many more is enough
    assert "does not divide" in limit(rates((256, 1.0)))[1]
    assert limit(rates((1024, 1.0)))[1] == "the global batch of 1024 has no sample for more"


def test_where_nothing_fits_there_is_no_step() -> None:
    assert step(planned(hardware={"memory_gb": 0.5}), 64) is None
    assert ladder(planned(hardware={"memory_gb": 0.5})) == []
    assert ladder(planned(hardware={"memory_gb": 12}))[0].workers > 1
