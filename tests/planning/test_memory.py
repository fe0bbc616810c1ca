"""ZeRO's arithmetic, and the micro-batch that fits, against measurement and against itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import measured
from dico_ray.config import Config, ConfigError
from dico_ray.planning import check, fits
from dico_ray.planning.memory import image_bytes, memory_at, state_memory
from dico_ray.recipes import resolve


def planned(
    recipe: str, hardware: dict[str, Any] | None = None, kernels: str = "torch", **train: Any
) -> Config:  # fmt: skip
    return resolve(recipe, None, {"train": train, "hardware": hardware or {}, "model": {"kernels": kernels}})


@given(
    parameters=st.integers(1, 10**10),
    stage=st.integers(0, 3),
    world=st.integers(1, 1024),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_memory_sums_and_never_grows_with_workers(parameters: int, stage: int, world: int, precision: str) -> None:
    one, many = state_memory(parameters, stage, 1, precision), state_memory(parameters, stage, world, precision)
    assert many.total == many.weights + many.gradients + many.optimizer + many.ema + many.buffers
    assert (many.buffers > 0) == (stage >= 2 and world > 1)
    for name, divided_from in (("weights", 3), ("gradients", 2), ("optimizer", 1), ("ema", 0)):
        whole, part = getattr(one, name), getattr(many, name)
        if stage >= divided_from:
            assert whole / world <= part < whole / world + 1  # rounded up: all ranks together hold all of it
        else:
            assert part == whole


def test_memory_of_one_billion_by_stage() -> None:
    """ZeRO's arithmetic (arXiv 1910.02054, figure 1), with fp32 gradients where they accumulate, and an EMA."""
    n, workers = 10**9, 4
    told = [state_memory(n, stage, workers, "bf16") for stage in range(4)]
    assert [m.weights / n for m in told] == [2, 2, 2, 0.5]
    assert [m.gradients / n for m in told] == [2, 4, 1, 1]
    assert [m.optimizer / n for m in told] == [12, 3, 3, 3]
    assert [m.ema / n for m in told] == [1, 1, 1, 1]
    full = [state_memory(n, stage, workers, "fp32") for stage in range(4)]
    assert [m.weights / n for m in full] == [4, 4, 4, 1]
    assert [m.gradients / n for m in full] == [4, 4, 1, 1]
    assert [m.optimizer / n for m in full] == [8, 3, 3, 3]
    graphs = [state_memory(n, stage, workers, "bf16", graphs=True).gradients for stage in range(3)]
    assert [more - m.gradients for more, m in zip(graphs, told, strict=False)] == [2 * n] * 3
    for stages, weight in ((told, 2), (full, 4)):
        assert [m.buffers / n for m in stages] == [0, 0, 0.2, weight]  # stage 3's: whole weights, up to 1e9 of them
    assert state_memory(4 * n, 3, workers, "bf16").buffers == 2 * n


def test_offload_moves_optimizer_and_averages_to_the_host() -> None:
    here, there = state_memory(1000, 2, 4, "bf16", averages=3), state_memory(1000, 2, 4, "bf16", 3, offload=True)
    assert there.host == here.optimizer + here.ema
    assert there.total == here.weights + here.gradients == here.total - here.buffers - there.host


def test_the_measured_run_s_memory_is_foreseen() -> None:
    """DiCo-H through the whole path, before there were CUDA graphs: within 2% of what the GPU's allocator told."""
    row = next(row for row in measured.rows() if row.what == measured.WHOLE and row.memory_gb)
    assert row.memory_gb
    assert row.micro_batch
    config = planned("dico-h-256", num_workers=1, micro_batch=row.micro_batch, cuda_graphs=False)
    assert row.model == config.model.name
    assert memory_at(config, 1, 1, row.micro_batch) / 1e9 == pytest.approx(row.memory_gb, rel=0.02)


@pytest.mark.parametrize(
    "row", [row for row in measured.rows() if row.what in (measured.WHOLE_FUSED, measured.ENGINE_FUSED)],
    ids=lambda row: f"{row.model}-{row.micro_batch}-{row.gpus}",
)  # fmt: skip
def test_memory_measured_with_fused_blocks_is_foreseen_within_a_tenth(row: measured.Row) -> None:
    """On one GPU and on two; workspaces are not in the forecast."""
    assert row.memory_gb
    assert row.micro_batch
    sizes = {"num_workers": row.gpus, "micro_batch": row.micro_batch, "global_batch": row.gpus * row.micro_batch}
    config = planned(f"{row.model.lower()}-256", kernels="auto", **sizes)
    foreseen = memory_at(config, 1, row.gpus, row.micro_batch) / 1e9
    assert foreseen == pytest.approx(row.memory_gb, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "row"),
    [(stage, row) for stage, what in measured.BY_STAGE.items() for row in measured.rows() if row.what == what],
)  # fmt: skip
def test_memory_measured_by_stage_is_foreseen_within_a_twentieth(stage: int, row: measured.Row) -> None:
    """DiCo-H and -XL on one H100 and on two, at ZeRO 1, 2 and 3."""
    assert row.memory_gb
    assert row.micro_batch
    sizes = {"num_workers": row.gpus, "micro_batch": row.micro_batch, "global_batch": row.gpus * row.micro_batch}
    config = planned(f"{row.model.lower()}-256", kernels="auto", zero_stage=stage, **sizes)
    foreseen = memory_at(config, stage, row.gpus, row.micro_batch) / 1e9
    assert foreseen == pytest.approx(row.memory_gb, rel=0.05)


def test_the_measured_ladder_s_slope_is_foreseen() -> None:
    """Two micro-batches of the bare loop, the same state: what an image takes, within 2%."""
    found = [row for row in measured.rows() if row.what == measured.BARE and row.model == "DiCo-H"]
    low, high = sorted((row.micro_batch or 0, row.memory_gb or 0) for row in found)
    slope = (high[1] - low[1]) / (high[0] - low[0])
    assert image_bytes(planned("dico-h-256"), 1) / 1e9 == pytest.approx(slope, rel=0.02)


@settings(max_examples=50)
@given(
    workers=st.sampled_from([1, 2, 4, 8, 64, 256]),
    stage=st.integers(0, 3),
    memory=st.floats(5, 200),
    recipe=st.sampled_from(["dico-s-256", "dico-b-256", "dico-xl-256", "dico-h-256"]),
)
def test_what_fits_is_the_most(workers: int, stage: int, memory: float, recipe: str) -> None:
    config = planned(recipe, {"memory_gb": memory}, num_workers=workers, zero_stage=stage)
    fit, share = fits(config), config.train.global_batch // workers
    room = memory * 1e9 * config.hardware.memory_share
    assert fit.room_gb == pytest.approx(room / 1e9)
    if fit.largest:
        assert memory_at(config, stage, workers, fit.largest) <= room
    assert memory_at(config, stage, workers, fit.largest + 1) > room
    assert fit.micro_batch <= fit.largest
    assert all(share % size for size in range(fit.micro_batch + 1, min(fit.largest, share) + 1))
    assert fit.micro_batch == 0 or share % fit.micro_batch == 0


def test_the_recipes_fit_where_the_paper_s_gpus_are_enough() -> None:
    for recipe in ("dico-s-256", "dico-b-256", "dico-l-256", "dico-xl-256", "dico-h-256", "dico-xl-512"):
        for kernels in ("auto", "torch"):
            check(planned(recipe, kernels=kernels))


@pytest.mark.parametrize(
    ("hardware", "train", "says"),
    [
        ({}, {"num_workers": 1, "micro_batch": 128}, "train.micro_batch: 128 takes "),
        ({}, {"num_workers": 8}, "train.micro_batch: 128 (unset: a worker's whole share) takes "),
        ({"memory_gb": 6}, {"num_workers": 64}, "set train.zero_stage 2 (and train.micro_batch at most "),
        ({"gpu": "L4"}, {"num_workers": 1, "micro_batch": 1}, "set train.num_workers 2, train.zero_stage "),
        ({"memory_gb": 0.9}, {"num_workers": 1, "micro_batch": 1}, "try train.offload true, or larger GPUs"),
        ({"memory_gb": 0.5}, {"num_workers": 1, "offload": True}, "take GPUs with more memory"),
    ],
)
def test_what_cannot_fit_is_told_with_the_mend(hardware: dict[str, Any], train: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        check(planned("dico-h-256", hardware, **train))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_the_mend_mends() -> None:
    with pytest.raises(ConfigError, match="set train.micro_batch 64$"):
        check(planned("dico-h-256", num_workers=1))
    check(planned("dico-h-256", num_workers=1, micro_batch=64))


def test_wrong_hardware_and_workers_are_told() -> None:
    with pytest.raises(ConfigError, match="hardware.gpu: 'T4' is not in the table; take one of B200, H200, H100"):
        fits(planned("dico-s-256", {"gpu": "T4"}))
    with pytest.raises(ConfigError, match="train.global_batch: 256 does not divide among 3 workers"):
        fits(planned("dico-s-256"), workers=3)


def test_fused_kernels_leave_room_for_more() -> None:
    plain, fused = (resolve("dico-h-256", None, {"model": {"kernels": kernels}}) for kernels in ("torch", "triton"))
    assert fits(fused).largest > 1.5 * fits(plain).largest  # 6 + r tensors a block instead of 8 + 2r, r = 4
