from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import metrics

GOLDEN = Path(__file__).parents[1] / "golden"


def moments_of(*batches: np.ndarray) -> metrics.Moments:
    moments = metrics.Moments(batches[0].shape[1])
    for batch in batches:
        moments.add(batch)
    return moments


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def random_covariance(seed: int, dim: int, rank: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return factor @ factor.T / rank


def test_frechet_distance_equals_the_released_evaluators() -> None:
    features = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())["frechet_distance"]
    generated = moments_of(features["features_generated"]).compute()
    reference = moments_of(features["features_reference"]).compute()
    assert metrics.frechet_distance(*generated, *reference) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(*reference, *generated) == pytest.approx(expected, rel=1e-6)


def test_compute_equals_numpy() -> None:
    features = np.random.default_rng(0).normal(3, 2, size=(100, 7))
    mu, sigma = moments_of(features[:1], features[1:60], features[60:]).compute()
    assert (mu.shape, sigma.shape, mu.dtype, sigma.dtype) == ((7,), (7, 7), np.float64, np.float64)
    assert relative(mu, features.mean(axis=0)) < 1e-14
    assert relative(sigma, np.cov(features, rowvar=False)) < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 80), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1.0, -50.0, 1000.0]),
)
def test_merged_parts_equal_the_whole(seed: int, dim: int, cuts: list[int], offset: float) -> None:
    features = np.random.default_rng(seed).normal(size=(80, dim)) + offset
    parts = np.split(features, sorted(cuts))
    merged = metrics.Moments(dim)
    for part in parts:
        merged.merge(moments_of(part))
    mu, sigma = moments_of(features).compute()
    merged_mu, merged_sigma = merged.compute()
    assert merged.count == 80
    assert relative(merged_mu, mu) < 1e-12
    assert relative(merged_sigma, sigma) < 1e-12


def test_a_far_mean_costs_no_digits() -> None:
    # Plain sums of x x^T would keep 16 - 2 log10(1e6 / 1) = 4 digits of the covariance here.
    features = np.random.default_rng(1).normal(size=(500, 3)) + 1e6
    _, sigma = moments_of(features[:200], features[200:]).compute()
    assert relative(sigma, np.cov(features - 1e6, rowvar=False)) < 1e-9


def test_merge_returns_self_and_leaves_other_alone() -> None:
    rng = np.random.default_rng(2)
    left, right = moments_of(rng.normal(size=(10, 3))), moments_of(rng.normal(size=(20, 3)))
    before = right.state()
    assert left.merge(right) is left
    assert all(np.array_equal(before[key], value) for key, value in right.state().items())
    mu, sigma = right.compute()
    mu_twice, sigma_twice = right.merge(right).compute()
    assert right.count == 40
    np.testing.assert_allclose(mu_twice, mu, rtol=1e-14)
    np.testing.assert_allclose(sigma_twice * 39, sigma * 19 * 2, rtol=1e-14)


def test_state_survives_a_file_bit_for_bit_and_shares_no_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    moments = moments_of(rng.normal(size=(50, 4)))
    np.savez(tmp_path / "moments.npz", **moments.state())  # pyright: ignore[reportArgumentType]
    loaded = np.load(tmp_path / "moments.npz", allow_pickle=False)
    state = {key: loaded[key] for key in loaded.files}
    copy = metrics.Moments.from_state(state)
    more = rng.normal(size=(5, 4))
    copy.add(more)
    moments.add(more)
    assert all(np.array_equal(moments.state()[key], value) for key, value in copy.state().items())
    assert metrics.Moments.from_state(state).count == 50
    exposed = moments.state()
    exposed["mean"][:] = 99
    moments.compute()[0][:] = 99
    assert moments.state()["mean"].max() < 99


def test_low_precision_features_are_accumulated_in_float64() -> None:
    features = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = metrics.Moments(5)
    moments.add(features.requires_grad_())
    assert relative(moments.compute()[1], np.cov(features.detach().double().numpy(), rowvar=False)) < 1e-14


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_and_nothing_is_taken_in(value: float) -> None:
    moments = moments_of(np.ones((10, 3)))
    batch = np.zeros((4, 3))
    batch[2, 1] = value
    with pytest.raises(ValueError, match=r"row 2 of this batch \(sample 12 .*feature 1 is .*sampler"):
        moments.add(batch)
    assert moments.count == 10
    assert moments.state()["mean"].tolist() == [1, 1, 1]


def test_too_few_samples_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, these moments hold 1"):
        moments_of(np.ones((1, 3))).compute()
    with pytest.raises(ValueError, match=r"shape \(5, 2\), expected \(N, 3\)"):
        metrics.Moments(3).add(np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(N, 3\)"):
        metrics.Moments(3).add(np.ones(3))
    with pytest.raises(ValueError, match="moments of 2 features into moments of 3"):
        metrics.Moments(3).merge(metrics.Moments(2))


def test_damaged_states_are_refused() -> None:
    state = moments_of(np.random.default_rng(0).normal(size=(9, 3))).state()
    with pytest.raises(ValueError, match="lack \\['scatter'\\]"):
        metrics.Moments.from_state({key: state[key] for key in ("count", "mean")})
    with pytest.raises(ValueError, match=r"scatter \(2, 3\)"):
        metrics.Moments.from_state({**state, "scatter": state["scatter"][:2]})
    with pytest.raises(ValueError, match="NaN"):
        metrics.Moments.from_state({**state, "mean": state["mean"] * np.nan})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 20))
def test_frechet_distance_equals_scipys_matrix_root(seed: int, dim: int) -> None:
    mu1, mu2 = np.random.default_rng(seed).normal(size=(2, dim))
    sigma1, sigma2 = random_covariance(seed + 1, dim, dim + 5), random_covariance(seed + 2, dim, dim + 5)
    root = np.asarray(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_covariances_keep_all_digits() -> None:
    # Both diagonal in one basis: the distance is the sum of (sqrt a - sqrt b)^2, in closed form.
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    first, second = np.zeros(60), np.zeros(60)
    first[:20] = rng.uniform(0.1, 5, size=20)
    second[10:40] = rng.uniform(0.1, 5, size=30)
    expected = np.square(np.sqrt(first) - np.sqrt(second)).sum()
    sigma1, sigma2 = (basis * first) @ basis.T, (basis * second) @ basis.T
    mu = np.zeros(60)
    assert metrics.frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(expected, rel=1e-13)
    assert metrics.frechet_distance(mu, sigma1, mu, 0 * sigma2) == pytest.approx(first.sum(), rel=1e-13)


@pytest.mark.parametrize("rank", [3, 40, 200])
def test_equal_gaussians_have_no_distance(rank: int) -> None:
    sigma = random_covariance(6, 40, rank)
    assert 0 <= metrics.frechet_distance(np.ones(40), sigma, np.ones(40), sigma) < 1e-12
    moved = metrics.frechet_distance(np.ones(40), sigma, np.full(40, 1.5), sigma)
    assert moved == pytest.approx(40 * 0.25, rel=1e-12)


def test_what_is_no_pair_of_gaussians_is_refused() -> None:
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=r"mu1 has 3 features and mu2 has 2: .*same feature network"):
        metrics.frechet_distance(mu, sigma, mu[:2], sigma[:2, :2])
    with pytest.raises(ValueError, match=r"mu2 has shape \(3,\) and sigma2 \(2, 3\); expected \(D,\) and"):
        metrics.frechet_distance(mu, sigma, mu, sigma[:2])
    with pytest.raises(ValueError, match="mu1 or sigma1 holds a NaN"):
        metrics.frechet_distance(mu * np.nan, sigma, mu, sigma)
    with pytest.raises(ValueError, match="sigma2 is not symmetric"):
        metrics.frechet_distance(mu, sigma, mu, sigma + np.triu(np.ones((3, 3)), 1))
    with pytest.raises(ValueError, match=r"sigma1 has the eigenvalue -0\.5"):
        metrics.frechet_distance(mu, np.diag([1.0, 1.0, -0.5]), mu, sigma)
