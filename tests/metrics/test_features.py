from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import metrics
from dico_ray.metrics import Features, Statistics


def features_of(count: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.randn(count, width, generator=generator) for width in (6, 4, 3)))


def part(features: Features, start: int, stop: int) -> Features:
    assert features.spatial is not None
    assert features.logits is not None
    return Features(features.pool[start:stop], features.spatial[start:stop], features.logits[start:stop])


def assert_same(mine: Statistics, whole: Statistics) -> None:
    for name in ("pool", "spatial"):
        for found, wanted in zip(getattr(mine, name).compute(), getattr(whole, name).compute(), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(mine.features(), whole.features())
    logits, wanted_logits = mine.logits(), whole.logits()
    assert logits is not None
    assert wanted_logits is not None
    assert torch.equal(logits, wanted_logits)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 59), min_size=1, max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
    every=st.sampled_from([1, 2, 7]),
    saved=st.booleans(),
)
def test_parts_in_any_order_equal_the_whole(cuts: list[int], order: random.Random, every: int, saved: bool) -> None:
    features = features_of(60)
    whole = Statistics(every)
    whole.add(0, features)
    edges = [0, *sorted(cuts), 60]
    ranges = list(itertools.pairwise(edges))
    order.shuffle(ranges)
    left, right = Statistics(every), Statistics(every)
    for i, (start, stop) in enumerate(ranges):
        (left if i % 2 else right).add(start, part(features, start, stop))
    if saved:
        left, right = (Statistics.from_state(one.state()) for one in (left, right))
    merged = left.merge(right)
    assert (merged.count, merged.ranges) == (60, sorted(ranges))
    assert len(merged.features()) == len(range(0, 60, every))
    assert_same(merged, whole)


def test_no_image_counts_twice() -> None:
    features = features_of(20)
    statistics = Statistics()
    statistics.add(10, part(features, 0, 10))
    for start in (5, 10, 15, 19):
        with pytest.raises(ValueError, match="are counted already"):
            statistics.add(start, part(features, 0, 6))
    other = Statistics()
    other.add(12, part(features, 0, 2))
    with pytest.raises(ValueError, match="images 12 to 13 are counted already"):
        statistics.merge(other)
    assert statistics.count == 10
    statistics.add(0, part(features, 10, 20))
    assert statistics.count == 20


def test_a_bad_feature_is_refused_and_nothing_is_taken_in() -> None:
    statistics = Statistics()
    broken = features_of(4)
    broken.pool[2, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        statistics.add(0, broken)
    assert statistics.count == 0


def test_state_shares_no_memory_and_damage_is_noticed() -> None:
    statistics = Statistics()
    statistics.add(0, features_of(8))
    state = statistics.state()
    copy = Statistics.from_state(state)
    state["features"][:] = 0
    assert copy.features().abs().sum() > 0
    with pytest.raises(ValueError, match="make them again"):
        Statistics.from_state({**statistics.state(), "features": np.zeros((9, 6), np.float32)})


def test_a_network_without_spatial_features_and_logits() -> None:
    statistics = Statistics()
    statistics.add(0, Features(torch.randn(5, 3)))
    again = Statistics.from_state(statistics.state())
    assert (again.spatial, again.logits(), again.count) == (None, None, 5)
    reference = metrics.Reference.of(again)
    assert reference.spatial is None
