from __future__ import annotations

from typing import Any

import pytest
import torch

from dico_ray.metrics import Features, Reference, Statistics, results
from dico_ray.metrics.inception import PUBLISHED


class Network:
    """Stands for a feature network's description alone; it is never called."""

    hash, image_size = "", None

    def __init__(self, name: str, is_inception: bool) -> None:
        self.name, self.is_inception = name, is_inception

    def __call__(self, pixels: torch.Tensor) -> Features:
        raise NotImplementedError


INCEPTION, OTHER = Network(PUBLISHED, True), Network("digits features", False)


def _statistics(count: int, seed: int, spatial: bool = True) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    pool, low, logits = (torch.randn(count, width, generator=generator) for width in (6, 4, 3))
    found = Statistics()
    found.add(0, Features(pool, low, logits) if spatial else Features(pool))
    return found


def test_what_the_reference_lacks_is_null_with_a_reason() -> None:
    images, whole = _statistics(40, 0), Reference.of(_statistics(50, 1))
    full = results.distances(INCEPTION, images, whole, 10)
    assert full["missing"] == {}
    assert full["fid"] == full["frechet_distance"] > 0
    assert full["sfid"] > 0
    assert full["inception_score"] > 1
    bare = results.distances(INCEPTION, images, Reference(pool=whole.pool), 10)
    assert (bare["sfid"], bare["fid"]) == (None, full["fid"])
    assert "mu_s" in bare["missing"]["sfid"]
    other = results.distances(OTHER, _statistics(40, 0, spatial=False), whole, 10)
    assert (other["fid"], other["sfid"], other["inception_score"]) == (None, None, None)
    assert set(other["missing"]) == {"fid", "sfid", "inception_score"}
    assert other["frechet_distance"] == pytest.approx(full["fid"])


@pytest.mark.parametrize(
    ("network", "count", "label"),
    [
        (INCEPTION, 50_000, "FID-50K"),
        (INCEPTION, 5000, "FID-5K"),
        (INCEPTION, 1234, "FID-1234"),
        (INCEPTION, 200, "FID-200"),
        (OTHER, 1000, "Frechet distance on digits features, 1000 images"),
    ],
)
def test_a_small_number_of_images_is_in_the_label(network: Network, count: int, label: str) -> None:
    assert results.label(network, count) == label


def test_only_the_published_network_on_enough_images_is_comparable() -> None:
    assert results.comparable(INCEPTION, 50_000)
    assert not results.comparable(INCEPTION, 49_999)
    assert not results.comparable(Network("Inception-v3 with the weights of mine.pth", True), 50_000)
    assert not results.comparable(OTHER, 50_000)


def test_warnings_name_what_biases_the_numbers() -> None:
    few, many = _statistics(6, 0), _statistics(7, 1)
    assert results.warnings(INCEPTION, many, Reference.of(many), False) == []
    (warning,) = results.warnings(INCEPTION, few, Reference.of(many), False)
    assert "6 images are too few for 6 features" in warning
    (warning,) = results.warnings(INCEPTION, many, Reference.of(few), False)
    assert "6 reference images are too few" in warning
    (warning,) = results.warnings(INCEPTION, many, Reference.of(many), True)
    assert "sorted by label" in warning
    assert results.warnings(OTHER, _statistics(7, 0, spatial=False), Reference(), True) == []


def test_differences_are_told_choice_by_choice() -> None:
    first: dict[str, Any] = {"fid": 2.0, "sfid": None, "provenance": {"count": 5, "samples": {"steps": 50, "seed": 0}}}
    second: dict[str, Any] = {"fid": 2.5, "sfid": 3.0, "provenance": {"count": 5, "samples": {"steps": 250, "seed": 0}}}
    choices, numbers = results.differences(first, second)
    assert choices == ["samples.steps: 50 | 250"]
    assert numbers == ["fid: 2 | 2.5 (+0.5)", "sfid: none | 3"]
    assert results.differences(first, first) == ([], ["fid: 2 | 2 (+0)"])
    assert results.differences(first, {})[0] == [
        "count: 5 | not told", "samples.seed: 0 | not told", "samples.steps: 50 | not told",
    ]  # fmt: skip
