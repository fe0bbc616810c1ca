"""Profiles against numerical integrals, and averages reconstructed from snapshots against those kept directly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad

from dico_ray.training import posthoc

WIDTHS = st.floats(0.002, 0.28)
STEPS = 3000


def shares(sigma_rel: float, steps: int, length: int = STEPS) -> np.ndarray:
    """What the weights after step 1, 2, ... are worth in the average at `steps`: the profile's integral, by step."""
    edges = np.minimum(np.arange(length + 1), steps) / steps
    return np.diff(edges ** (posthoc.gamma_of(sigma_rel) + 1))


@given(WIDTHS)
def test_width_to_exponent_and_back(sigma_rel: float) -> None:
    gamma = posthoc.gamma_of(sigma_rel)
    assert gamma >= 0
    assert posthoc.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)


@given(st.floats(0, 500))
def test_exponent_to_width_and_back(gamma: float) -> None:
    assert posthoc.gamma_of(posthoc.sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-7, abs=1e-7)


def test_the_pairs_that_the_paper_names() -> None:
    """EDM2 keeps widths 0.05 and 0.10, exponents 16.97 and 6.94; an exponent of 0 is the plain mean."""
    assert [round(posthoc.gamma_of(s), 2) for s in (0.05, 0.1)] == [16.97, 6.94]
    assert posthoc.sigma_rel_of(0) == pytest.approx(12**-0.5)
    for wrong in (0.0, -0.1, 0.29, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            posthoc.gamma_of(wrong)


def test_a_width_is_the_profiles_standard_deviation() -> None:
    steps = np.arange(1, STEPS + 1)
    for sigma_rel in (0.03, 0.1, 0.25):
        p = shares(sigma_rel, STEPS)
        mean = p @ steps
        assert np.sqrt(p @ (steps - mean) ** 2) / STEPS == pytest.approx(sigma_rel, rel=1e-4)


@given(WIDTHS, WIDTHS, st.floats(0.2, 1), st.integers(1, 10**7))
def test_inner_products_are_the_integrals(a: float, b: float, ratio: float, step: int) -> None:
    ga, gb = posthoc.gamma_of(a), posthoc.gamma_of(b)
    # On [0, 1], where the later profile ends at 1 and the earlier at `ratio`; the substitution tames the peak.
    wanted, _ = quad(lambda x: (ga + 1) / ratio * (x / ratio) ** ga * (gb + 1) * x**gb, 0, ratio, epsabs=0, limit=500)
    assume(wanted > 1e-200)
    assert float(posthoc.inner(ratio * step, ga, step, gb)) * step == pytest.approx(wanted, rel=1e-6)
    assert posthoc.inner(step, gb, ratio * step, ga) == posthoc.inner(ratio * step, ga, step, gb)


def test_updates_sum_to_the_profile() -> None:
    for sigma_rel in (0.05, 0.2):
        gamma, average = posthoc.gamma_of(sigma_rel), np.zeros(200)
        for step in range(1, 201):
            beta = posthoc.decay(step, gamma)
            average = beta * average + (1 - beta) * np.eye(200)[step - 1]
        np.testing.assert_allclose(average, shares(sigma_rel, 200, 200), rtol=1e-10, atol=1e-18)


def _snapshots(every: int) -> list[tuple[int, float]]:
    return [(step, width) for step in range(every, STEPS + 1, every) for width in (0.05, 0.1)]


@pytest.mark.parametrize(("step", "width", "tolerance"), [
    (STEPS, 0.075, 2e-3), (STEPS, 0.15, 1e-2), (2000, 0.075, 2e-3), (STEPS, 0.03, 3e-2), (1234, 0.12, 3e-2),
])  # fmt: skip
def test_a_third_width_from_snapshots_of_two_equals_the_one_kept_directly(
    step: int, width: float, tolerance: float
) -> None:
    """On random walks of 64 weights, relative to how far the average lies from the weights themselves.

    Harder are a narrower width than those kept, and a step between two snapshots. What the walks have in common
    comes back whole.
    """
    walk = 1000 + np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 64)), axis=0)
    snapshots = _snapshots(100)
    factors = posthoc.weights(snapshots, step, width)
    found = sum(f * shares(s, t) @ walk for f, (t, s) in zip(factors, snapshots, strict=True))
    wanted = shares(width, step) @ walk
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted - walk[step - 1])


def test_the_error_is_the_profiles_distance_and_falls_with_more_snapshots() -> None:
    errors = []
    for every in (1000, 300, 100):
        snapshots = _snapshots(every)
        factors = posthoc.weights(snapshots, STEPS, 0.075)
        errors.append(posthoc.error(snapshots, factors, STEPS, 0.075))
        found = sum(f * shares(s, t) for f, (t, s) in zip(factors, snapshots, strict=True))
        wanted = shares(0.075, STEPS)
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) == pytest.approx(errors[-1], rel=0.1)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


def test_what_was_kept_comes_back_as_it_is() -> None:
    factors = posthoc.weights(_snapshots(100), 2000, 0.1)
    expected = np.array([snapshot == (2000, 0.1) for snapshot in _snapshots(100)], float)
    np.testing.assert_allclose(factors, expected, atol=1e-6)
    assert posthoc.error(_snapshots(100), factors, 2000, 0.1) < 1e-6


def test_many_snapshots_of_a_long_run_stay_well_conditioned() -> None:
    """Factors that cancel would raise the snapshots' fp32 rounding: their sum of sizes stays small."""
    snapshots = [(s, w) for s in range(2000, 400_001, 2000) for w in (0.05, 0.1, 0.2)]
    for width in (0.04, 0.075, 0.15, 0.25):
        factors = posthoc.weights(snapshots, 400_000, width)
        assert posthoc.error(snapshots, factors, 400_000, width) < 1e-3
        assert np.abs(factors).sum() < 100
        assert factors.sum() == pytest.approx(1, abs=1e-12)


def test_names() -> None:
    assert posthoc.kind(0.05) == "ema-0.050"
    assert posthoc.sigma_of("ema-0.050") == 0.05
    with pytest.raises(ValueError, match="no snapshots"):
        posthoc.weights([], 5, 0.1)
