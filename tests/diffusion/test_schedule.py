from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dico_ray.diffusion.schedule import Schedule, spaced_timesteps

GOLDEN = Path(__file__).parents[1] / "golden"


def test_linear_betas_run_from_1e_4_to_2e_2():
    schedule = Schedule.linear(1000)
    assert len(schedule) == 1000
    assert schedule.betas.dtype == np.float64
    np.testing.assert_allclose(schedule.betas[[0, 999]], [1e-4, 0.02])
    np.testing.assert_allclose(np.diff(schedule.betas), 0.0199 / 999)


def test_other_step_counts_end_at_about_the_same_noise():
    reference = Schedule.linear(1000).alphas_cumprod[-1]
    assert Schedule.linear(4000).alphas_cumprod[-1] == pytest.approx(reference, rel=0.3)


def test_posterior_equals_bayes_rule():
    # q(x_{i-1} | x_i, x_0) is proportional to q(x_i | x_{i-1}) q(x_{i-1} | x_0): precisions add.
    schedule = Schedule.linear(1000)
    beta, previous = schedule.betas[1:], schedule.alphas_cumprod_prev[1:]
    alpha = 1 - beta
    precision = alpha / beta + 1 / (1 - previous)
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision)
    np.testing.assert_allclose(schedule.posterior_mean_xt[1:], np.sqrt(alpha) / beta / precision)
    np.testing.assert_allclose(schedule.posterior_mean_x0[1:], np.sqrt(previous) / (1 - previous) / precision)
    np.testing.assert_allclose(schedule.posterior_log_variance[1:], -np.log(precision))
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


@pytest.mark.parametrize("steps", [250, 50, 10, 2])
def test_respacing_keeps_abar_at_every_timestep(steps: int):
    full, timesteps = Schedule.linear(1000), spaced_timesteps(1000, steps)
    short = full.respaced(timesteps)
    assert len(short) == steps
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[timesteps], rtol=1e-9)


def test_respacing_to_all_steps_changes_nothing():
    full = Schedule.linear(1000)
    np.testing.assert_allclose(full.respaced(np.arange(1000)).betas, full.betas, rtol=1e-9)


@pytest.mark.parametrize("steps", [250, 50, 10])
def test_timesteps_equal_the_released_ones(steps: int):
    with np.load(GOLDEN / "diffusion.npz") as golden:
        np.testing.assert_array_equal(spaced_timesteps(1000, steps), golden[f"timesteps_{steps}"])


def test_timesteps_are_distinct_and_reach_both_ends_for_every_count():
    for steps in range(2, 101):
        timesteps = spaced_timesteps(100, steps)
        assert timesteps.dtype == np.int64
        assert len(timesteps) == steps
        assert (timesteps[0], timesteps[-1]) == (0, 99)
        assert (np.diff(timesteps) > 0).all()


def test_halves_are_rounded_to_even():
    # 999/2 = 499.5 -> 500; eight spacings of 124.875: 499.5 again; 5 x 99.9 = 499.5, which floats miss.
    assert [spaced_timesteps(1000, n)[n // 2] for n in (3, 9, 11)] == [500, 500, 500]
    assert spaced_timesteps(1000, 7)[[1, 3]].tolist() == [166, 500]


def test_a_single_step_starts_from_pure_noise():
    timesteps = spaced_timesteps(1000, 1)
    assert timesteps.tolist() == [999]
    assert np.isfinite(Schedule.linear(1000).respaced(timesteps).posterior_log_variance).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_refuses_impossible_step_counts(steps: int):
    with pytest.raises(ValueError, match=f"steps is {steps}.*1 to 1000"):
        spaced_timesteps(1000, steps)


@pytest.mark.parametrize("num_steps", [-5, 0, 1, 20])
def test_refuses_schedules_that_reach_one(num_steps: int):
    with pytest.raises(ValueError, match=r"num_steps is .* at least 21"):
        Schedule.linear(num_steps)
    Schedule.linear(21)


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0, 0.1], [[0.1]]])
def test_refuses_impossible_betas(betas: list[float]):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Schedule.from_betas(np.array(betas))
