"""Forecasts of a micro-batch's time: the measured rows come out again, and what lies between and beyond is labelled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import measured
from dico_ray.config import Config
from dico_ray.planning.speed import Time, micro_batch_time, why_unknown
from dico_ray.recipes import resolve


def planned(recipe: str, gpu: str = "H100", kernels: str = "torch", **train: Any) -> Config:
    return resolve(recipe, None, {"train": train, "hardware": {"gpu": gpu}, "model": {"kernels": kernels}})


def timed(config: Config, micro_batch: int) -> Time:
    time = micro_batch_time(config, micro_batch)
    assert time
    return time


@pytest.mark.parametrize(("kernels", "what"), [("torch", measured.WHOLE), ("auto", measured.WHOLE_FUSED)])
def test_a_measured_row_is_its_own_forecast(kernels: str, what: str) -> None:
    row = next(row for row in measured.rows() if row.what == what and row.gpus == 1)
    assert row.micro_batch
    time = timed(planned("dico-h-256", kernels=kernels, cuda_graphs=kernels == "auto"), row.micro_batch)
    assert time.basis == "measured"
    assert row.micro_batch / time.seconds == pytest.approx(row.images_per_s)
    assert time.least_s == time.most_s == time.seconds


@pytest.mark.parametrize("settings", [{"cuda_graphs": True}, {"kernels": "auto", "recompute_gelu": False}])
def test_a_row_of_other_settings_is_no_measurement(settings: dict[str, Any]) -> None:
    """Compiled blocks were measured without graphs, fused ones making the GELU again."""
    assert timed(planned("dico-h-256", **settings), 64).basis == "extrapolated"


@pytest.mark.parametrize("workers", [2, 8])
def test_one_gpus_row_is_no_measurement_of_several(workers: int) -> None:
    """Their own work is foreseen to be the same; what they lose to each other no such row tells."""
    row = next(row for row in measured.rows() if row.what == measured.WHOLE and row.gpus == 1)
    assert row.micro_batch
    one = timed(planned("dico-h-256"), row.micro_batch)
    several = micro_batch_time(planned("dico-h-256"), row.micro_batch, workers=workers)
    assert several
    assert (several.seconds, several.row, several.basis) == (one.seconds, row, "extrapolated")
    assert several.least_s <= one.seconds < several.most_s


def test_the_bare_loop_of_the_same_network_carries_the_whole_path_s_toll() -> None:
    """DiCo-XL was measured in the bare loop alone: its forecast is that row, slowed as DiCo-H was."""
    row = next(row for row in measured.rows() if row.what == measured.BARE and row.model == "DiCo-XL")
    assert row.micro_batch
    assert row.images_per_s
    time = timed(planned("dico-xl-256"), row.micro_batch)
    assert (time.basis, time.row) == ("extrapolated", row)
    assert row.micro_batch / time.seconds == pytest.approx(row.images_per_s * 225 / 250)


@pytest.mark.parametrize(
    ("recipe", "model", "other"), [("dico-xl-256", "DiCo-XL", "DiCo-H"), ("dico-h-256", "DiCo-H", "DiCo-XL")]
)
def test_each_measured_network_is_foreseen_from_the_other_within_a_fifth(recipe: str, model: str, other: str) -> None:
    """What the model of work is worth: the forecasts from the other network's rows alone."""
    own = [row for row in measured.rows() if row.what == measured.BARE and row.model == model]
    rest = tuple(row for row in measured.rows() if row.model != model or row.what == measured.PRODUCTS)
    assert other in {row.model for row in rest}
    for row in own:
        assert row.micro_batch
        assert row.images_per_s
        toll = 225 / 250 if other == "DiCo-H" else 1  # DiCo-XL's rows have no pair that would tell it
        time = micro_batch_time(planned(recipe), row.micro_batch, rest)
        assert time
        assert row.micro_batch / time.seconds == pytest.approx(row.images_per_s * toll, rel=0.2)


@pytest.mark.parametrize("model", ["DiCo-H", "DiCo-XL", "DiCo-L", "DiCo-B"])
def test_fused_networks_are_foreseen_from_the_others_within_a_quarter(model: str) -> None:
    """From the rows of networks that are not it: those of DiCo-S, an image of which takes 0.2 ms, mostly launches, too.

    DiCo-S itself is too far from the others: a seventh of their arithmetic.
    """
    rest = tuple(row for row in measured.rows() if row.model != model or row.what == measured.PRODUCTS)
    rows = [row for row in measured.rows() if row.what == measured.ENGINE_FUSED and row.model == model]
    assert rows
    for row in rows:
        assert row.micro_batch
        assert row.images_per_s
        time = micro_batch_time(planned(f"{model.lower()}-256", kernels="auto"), row.micro_batch, rest)
        assert time
        assert time.basis == "extrapolated"
        assert row.micro_batch / time.seconds == pytest.approx(row.images_per_s, rel=0.25)


def test_between_two_measured_micro_batches_time_is_interpolated() -> None:
    """With the bare loop's two rows given as the whole path's."""
    bare = [row for row in measured.rows() if row.what == measured.BARE and row.model == "DiCo-H"]
    others = [row for row in measured.rows() if row.what != measured.WHOLE]
    rows = (*others, *(replace(row, what=measured.WHOLE) for row in bare))
    between = micro_batch_time(planned("dico-h-256", cuda_graphs=False), 80, rows)
    beyond = micro_batch_time(planned("dico-h-256", cuda_graphs=False), 128, rows)
    assert between
    assert beyond
    assert (between.basis, beyond.basis) == ("interpolated", "extrapolated")
    assert between.seconds == pytest.approx((64 / 250 + 96 / 259) / 2)


@settings(max_examples=40, deadline=None)
@given(
    recipe=st.sampled_from(["dico-s-256", "dico-b-256", "dico-l-256", "dico-xl-256", "dico-h-256", "dico-xl-512"]),
    gpu=st.sampled_from(["H100", "H200", "A100", "L4"]),
    kernels=st.sampled_from(["auto", "torch"]),
    micro_batch=st.integers(1, 200),
)
def test_more_images_take_longer_and_each_of_them_less(recipe: str, gpu: str, kernels: str, micro_batch: int) -> None:
    config = planned(recipe, gpu, kernels)
    one, two = timed(config, micro_batch), timed(config, micro_batch + 1)
    assert one.seconds < two.seconds
    assert two.seconds / (micro_batch + 1) < one.seconds / micro_batch
    for time in (one, two):
        assert 0 < time.launches_s < time.seconds
        assert time.least_s <= time.seconds <= time.most_s


def test_slower_gpus_take_longer() -> None:
    for kernels in ("auto", "torch"):
        gpus = ("B200", "H200", "H100", "A100", "L4")
        times = [timed(planned("dico-h-256", gpu, kernels), 16).seconds for gpu in gpus]
        assert times == sorted(times)


def test_at_stage_3_the_one_row_gives_a_range() -> None:
    """Either all that work does not explain is launches (the forecast), or all shrinks with the micro-batch."""
    row = next(row for row in measured.rows() if row.what == measured.WHOLE_STAGE_3)
    assert row.micro_batch
    assert row.images_per_s
    own = row.micro_batch / row.images_per_s
    same, small = (timed(planned("dico-h-256", row.gpu, zero_stage=3), size) for size in (row.micro_batch, 8))
    assert same.seconds == pytest.approx(own)
    assert small.seconds == small.most_s > 0.5 * own
    assert small.least_s == pytest.approx(own * 8 / row.micro_batch)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"precision": "fp32"}, "train.precision fp32"),
        ({"offload": True}, "train.offload true"),
        ({"compile": False}, "train.compile false"),
        ({"zero_stage": 3, "kernels": "auto"}, "train.zero_stage 3 with fused blocks"),
        ({"cuda_graphs": False, "kernels": "auto"}, "train.cuda_graphs false"),
    ],
)
def test_what_was_never_measured_is_not_forecast(train: dict[str, Any], says: str) -> None:
    config = planned("dico-h-256", **train)
    assert micro_batch_time(config, 16) is None
    assert says in why_unknown(config)


def test_stage_2_is_as_fast_as_stage_1() -> None:
    """As measured on one H100 and on two, in one run each; and as foreseen for two."""
    rates = {
        stage: {(row.model, row.gpus): row for row in measured.rows() if row.what == measured.BY_STAGE[stage]}
        for stage in (1, 2)
    }
    assert len(rates[1]) == len(rates[2]) == 4
    for of, row in rates[2].items():
        other = rates[1][of]
        assert row.images_per_s
        assert other.images_per_s
        assert row.images_per_s / other.images_per_s == pytest.approx(1, abs=0.03)
        if row.gpus == 2:
            time = timed(planned(f"{row.model.lower()}-256", "H100", "auto", zero_stage=2), 64)
            assert time.basis == "extrapolated"
            assert 64 / time.seconds == pytest.approx(row.images_per_s, rel=0.1)
