"""Solvers against distributions whose exact results are known: every value is drawn from two normal ones."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dico_ray.config.sampling import Sample
from dico_ray.diffusion import Diffusion, Guidance, Sampler, Solver, Stream, make_sampler
from dico_ray.diffusion.noise import normal
from dico_ray.diffusion.solvers import METHODS, MULTISTEP, STOCHASTIC, log_snr_timesteps

DIFFUSION = Diffusion()
ABAR = torch.from_numpy(DIFFUSION.schedule.alphas_cumprod)
MEANS, DEVIATIONS, WEIGHTS = (torch.tensor(v).double() for v in ([-1.0, 0.5], [0.2, 0.35], [0.4, 0.6]))
SOLVERS = (*MULTISTEP, "heun")
ODE = tuple(name for name in SOLVERS if name not in STOCHASTIC)


def parts(abar: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of the two normal distributions after noising."""
    return abar.sqrt()[..., None] * MEANS, abar[..., None] * DEVIATIONS**2 + 1 - abar[..., None]


def network(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """The perfect network: noise = -sqrt(1 - abar) times the score, and a second half that must not matter."""
    abar = ABAR[t].view(-1, 1, 1, 1)
    means, variances = parts(abar)
    distance = x.double()[..., None] - means
    share = (WEIGHTS.log() - 0.5 * variances.log() - 0.5 * distance**2 / variances).softmax(-1)
    noise = (1 - abar).sqrt() * (share * distance / variances).sum(-1)
    return torch.cat([noise, torch.full_like(noise, 7.0)], dim=1).to(x.dtype)


def distribution(x: Tensor, abar: Tensor) -> Tensor:
    means, variances = parts(abar)
    return (WEIGHTS * torch.special.ndtr((x[..., None] - means) / variances.sqrt())).sum(-1)


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Tensor]:
    """Noise, and where the probability-flow equation takes it: in one dimension it keeps the quantiles."""
    x_T = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = distribution(x_T, ABAR[999])
    low, high = torch.full_like(x_T, -6), torch.full_like(x_T, 6)
    for _ in range(50):
        middle = (low + high) / 2
        below = distribution(middle, torch.ones((), dtype=torch.float64)) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return x_T, (low + high) / 2


def error(x_0: Tensor, exact: Tensor) -> float:
    return ((x_0.double() - exact).pow(2).mean().sqrt() / exact.std()).item()


def test_the_configs_methods_are_those_that_exist() -> None:
    assert get_args(Sample.model_fields["method"].annotation) == METHODS


#                                    method     of DDIM's error in 250 steps, after 10, 20 and 50
@pytest.mark.parametrize(("method", "bounds"), [("dpm++2m", (12.0, 3.0, 0.45)), ("dpm++3m", (12.0, 0.8, 0.12)),
                                                ("unipc", (11.0, 1.3, 0.12)), ("heun", (13.0, 2.8, 0.45))])  # fmt: skip
def test_few_steps_come_as_near_as_250_of_ddim(
    known: tuple[Tensor, Tensor], method: str, bounds: tuple[float, ...]
) -> None:
    x_T, exact = known
    reference = error(Sampler(DIFFUSION, 250, "ddim").sample(network, x_T), exact)
    assert reference < 0.01
    for steps, bound in zip((10, 20, 50), bounds, strict=True):
        assert error(make_sampler(DIFFUSION, steps, method).sample(network, x_T), exact) < bound * reference
    assert error(Sampler(DIFFUSION, 20, "ddim").sample(network, x_T), exact) > 8 * reference


@pytest.mark.parametrize(("method", "steps"), [("ddpm", 250), ("dpm++2m-sde", 40)])
def test_stochastic_methods_draw_the_distribution(method: str, steps: int) -> None:
    rows = torch.arange(16)
    x_0 = make_sampler(DIFFUSION, steps, method).sample(
        lambda x, t: network(x, t)[:, :4],
        normal(1, Stream.SAMPLE_START, 0, rows, (4, 16, 16)),
        lambda index: normal(1, Stream.SAMPLE_STEP, index, rows, (4, 16, 16)),
    )
    values = x_0.double().flatten().sort().values
    expected = distribution(values, torch.ones((), dtype=torch.float64))
    found = torch.arange(1, len(values) + 1) / len(values)
    assert (found - expected).abs().max() < 0.02  # Kolmogorov and Smirnov's distance; chance alone: 0.011


def test_eulers_scheduler_would_be_ddim(known: tuple[Tensor, Tensor]) -> None:
    """Why there is no method "euler"."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    x_T, _ = known
    ddim = Sampler(DIFFUSION, 20, "ddim")
    scheduler: Any = EulerDiscreteScheduler(trained_betas=DIFFUSION.schedule.betas)  # pyright: ignore[reportArgumentType]
    scheduler.set_timesteps(timesteps=ddim.timesteps[::-1].tolist())
    scheduler.set_begin_index(0)
    x = x_T.float() * float((1 / ABAR[999]).sqrt())
    for t in scheduler.timesteps:
        predicted = network(scheduler.scale_model_input(x, t), torch.full((2,), int(t)))[:, :4]
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, ddim.sample(network, x_T.float()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(method: str) -> None:
    def sample(rows: Tensor) -> Tensor:
        return make_sampler(DIFFUSION, 8, method).sample(
            network,
            normal(3, Stream.SAMPLE_START, 0, rows, (4, 8, 8)),
            lambda index: normal(3, Stream.SAMPLE_STEP, index, rows, (4, 8, 8)),
        )

    whole = sample(torch.arange(6))
    torch.testing.assert_close(sample(torch.tensor([4, 1])), whole[[4, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_can_be_used_again(method: str) -> None:
    solver, x_T = make_sampler(DIFFUSION, 5, method), torch.ones(1, 4, 8, 8)
    noise = torch.zeros(5, *x_T.shape)
    assert torch.equal(solver.sample(network, x_T, noise), solver.sample(network, x_T, noise))


@pytest.mark.parametrize(("method", "evaluations"), [("unipc", 10), ("dpm++2m", 10), ("dpm++2m-sde", 10), ("heun", 19)])
def test_evaluations_and_guidance_within_its_interval(method: str, evaluations: int) -> None:
    calls: list[tuple[int, int]] = []

    def labelled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((len(x), int(t[0])))
        return network(x, t)

    guidance = Guidance(2.0, null_label=9, interval=(300, 700))
    solver = Solver(DIFFUSION, 10, method, guidance)
    solver.sample(labelled, torch.ones(2, 4, 8, 8), y=torch.tensor([1, 2]))
    assert [t for _, t in calls] == solver.timesteps[::-1].tolist()
    assert len(calls) == evaluations
    assert all(batch == (4 if 300 <= t <= 700 else 2) for batch, t in calls)
    assert sum(batch for batch, _ in calls) == 2 * solver.network_rows
    assert {batch for batch, _ in calls} == {2, 4}


def test_guidance_moves_the_result_and_leaves_the_other_channels() -> None:
    def labelled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, t) + 0.1 * y.view(-1, 1, 1, 1)

    x_T, y = torch.ones(1, 4, 8, 8), torch.tensor([1])
    plain = Solver(DIFFUSION, 10, "unipc").sample(labelled, x_T, y=y)
    guided = Solver(DIFFUSION, 10, "unipc", Guidance(1.5, 5)).sample(labelled, x_T, y=y)
    assert (guided - plain)[:, :3].abs().min() > 1e-3
    assert torch.equal(guided[:, 3], plain[:, 3])


@given(st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_log_snr_timesteps_are_different_and_reach_both_ends(steps: int) -> None:
    chosen = log_snr_timesteps(DIFFUSION.schedule.alphas_cumprod, steps)
    assert len(chosen) == steps
    assert chosen[-1] == 999
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] == (0 if steps > 1 else 999)


@pytest.mark.parametrize(
    ("method", "steps"), [*((method, steps) for method in SOLVERS for steps in (1, 2)), ("dpm++3m", 1000)]
)
def test_extreme_numbers_of_steps_are_finite(method: str, steps: int) -> None:
    x_0 = make_sampler(DIFFUSION, steps, method).sample(network, torch.ones(1, 4, 4, 4))
    assert x_0.isfinite().all()
    assert x_0.dtype == torch.float32


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"dpm\+\+2m, .*heun"):
        Solver(DIFFUSION, 10, "ddim")
    with pytest.raises(ValueError, match="euler"):
        make_sampler(DIFFUSION, 10, "euler")
    with pytest.raises(ValueError, match="1 to 1000"):
        Solver(DIFFUSION, 1001, "unipc")
    with pytest.raises(ValueError, match=r"noise has shape \(9, 1.*\(10, 1"):
        Solver(DIFFUSION, 10, "dpm++2m-sde").sample(network, torch.ones(1, 4, 4, 4), torch.zeros(9, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="guidance needs the labels y"):
        Solver(DIFFUSION, 10, "unipc", Guidance(1.4, 9)).sample(network, torch.ones(1, 4, 4, 4))
