"""Fits of a sweep against curves whose parameters are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from dico_ray.scaling.fits import frontier, learning_rate_line, optimum, power_law


@settings(max_examples=60, deadline=None)
@given(best=st.floats(-9, -3), curvature=st.floats(0.01, 5), floor=st.floats(0.01, 1), offset=st.floats(-1.3, 1.3))
def test_a_parabola_gives_its_lowest_point(best: float, curvature: float, floor: float, offset: float) -> None:
    x = best + offset + np.array([-2, -1, 0, 1, 2]) * 0.7
    y = floor + curvature / 2 * (x - best) ** 2
    found = optimum(np.exp(x).tolist(), y.tolist())
    assert found is not None
    assert found.lr == pytest.approx(math.exp(best), rel=1e-5)
    assert found.loss == pytest.approx(floor, rel=1e-5)
    assert found.curvature == pytest.approx(curvature, rel=1e-5)
    assert found.inside == (x[0] < best < x[-1])


def test_noise_moves_the_optimum_as_far_as_its_interval_says() -> None:
    x, rng = np.linspace(-2, 2, 5), np.random.default_rng(0)
    hits, intervals = 0, 0
    for seed in range(200):
        found = optimum(np.exp(x).tolist(), (1 + 0.5 * (x - 0.3) ** 2 + 0.05 * rng.standard_normal(5)).tolist(), seed)
        if found and found.interval:
            intervals += 1
            hits += found.interval[0] < math.exp(0.3) < found.interval[1]
    assert intervals == 200
    assert 0.7 < hits / intervals < 0.97  # two degrees of freedom: residuals underestimate the noise now and then


def test_no_optimum_is_claimed_where_there_is_none() -> None:
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    assert optimum(rates, [3.0, 2.9, 2.5, 1.5]) is None  # bends down: no least
    assert optimum(rates[:2], [3.0, 2.0]) is None
    assert optimum(rates, [3.0, 2.0, math.inf, math.inf]) is None
    falling = optimum(rates, [4.0, 3.0, 2.2, 1.6])
    assert falling is not None
    assert not falling.inside


def test_diverged_trials_and_far_ones_are_left_out() -> None:
    rates = [10.0**k for k in range(-8, 1)]
    losses = [(math.log(r) + 9) ** 2 / 100 + 1 for r in rates]
    clean = optimum(rates, losses)
    losses[0], losses[-1] = 50.0, math.inf
    losses[7] = 30.0
    found = optimum(rates, losses)
    assert found is not None
    assert clean is not None
    assert found.lr == pytest.approx(clean.lr)


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(-1, 1), offset=st.floats(-8, 0))
def test_the_line_through_optima_extrapolates(slope: float, offset: float) -> None:
    sizes = [1e6, 4e6, 2e7]
    optima = []
    for size in sizes:
        best = offset + slope * math.log(size)
        x = best + np.linspace(-1, 1, 5)
        found = optimum(np.exp(x).tolist(), (1 + 0.1 * (x - best) ** 2).tolist())
        assert found is not None
        optima.append(found)
    line = learning_rate_line(sizes, optima)
    assert line is not None
    assert line.slope == pytest.approx(slope, abs=1e-4)
    assert math.log(line.at(1e9)) == pytest.approx(offset + slope * math.log(1e9), abs=1e-3)
    interval = line.interval(1e9)
    assert interval is not None
    assert interval[0] <= line.at(1e9) * 1.001
    assert interval[1] >= line.at(1e9) * 0.999


@settings(max_examples=8, deadline=None)
@given(floor=st.floats(0.05, 0.5), scale=st.floats(0.1, 1), exponent=st.floats(0.1, 1.0))
def test_a_power_law_is_found_again(floor: float, scale: float, exponent: float) -> None:
    compute = np.geomspace(1e12, 1e16, 20)
    loss = floor + scale * (compute / 1e14) ** -exponent
    law = power_law(compute, loss)
    assert law is not None
    np.testing.assert_allclose(law.at(compute), loss, rtol=0.02)
    np.testing.assert_allclose(law.at(4e16), floor + scale * 400**-exponent, rtol=0.05)


def test_a_noisy_power_law_agrees_with_scipys_least_squares() -> None:
    compute, rng = np.geomspace(1e12, 1e15, 25), np.random.default_rng(1)
    unit = float(np.exp(np.log(compute).mean()))
    loss = 0.2 + 0.3 * (compute / unit) ** -0.4 + 0.005 * rng.standard_normal(25)
    law = power_law(compute, loss)
    assert law is not None
    reference, _ = curve_fit(lambda c, e, a, b: e + a * c**-b, compute / unit, loss, p0=(0.1, 0.3, 0.5))
    np.testing.assert_allclose(
        law.at(compute), reference[0] + reference[1] * (compute / unit) ** -reference[2], rtol=3e-3
    )
    low, high = law.band(compute * 3)
    assert (low < law.at(compute * 3)).all()
    assert (law.at(compute * 3) < high).all()
    inner, outer = law.band(compute.mean()), law.band(1e18)
    assert outer[1] - outer[0] > inner[1] - inner[0]  # less is known far away


def test_the_frontier_falls_and_leaves_out_what_costs_more_for_less() -> None:
    rng = np.random.default_rng(0)
    compute = np.geomspace(1, 1e4, 500)
    loss = compute**-0.3 * (1 + rng.random(500))
    c, v = frontier(compute, loss)
    assert len(c) <= 24
    assert (np.diff(c) > 0).all()
    assert (np.diff(v) < 0).all()
    for cost, value in zip(c, v, strict=True):
        assert value <= loss[compute <= cost].min() + 1e-12 or value == loss[compute == cost]
    assert len(frontier(np.array([1.0, 2.0]), np.array([np.inf, np.inf]))[0]) == 0
