from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_ray.diffusion import Diffusion
from dico_ray.diffusion.process import (
    discretized_log_likelihood,
    gaussian_kl,
    interpolated_log_variance,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def network(x: Tensor, t: Tensor) -> Tensor:
    """The function that the golden values were computed with."""
    s = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(0.9 * x + 0.1 * s), torch.sin(3 * x + s)], dim=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "diffusion.npz") as archive:
        names = ("x0", "noise", "t", "x_t", "loss_loss", "loss_mse", "loss_vb")
        return {name: torch.from_numpy(archive[name]) for name in names}


def test_q_sample_equals_the_released_code(golden: dict[str, Tensor]):
    x_t = Diffusion().q_sample(golden["x0"], golden["t"], golden["noise"])
    assert x_t.dtype == torch.float64
    assert relative_error(x_t, golden["x_t"]) < 1e-6


@pytest.mark.parametrize("term", ["loss", "mse", "vb"])
def test_losses_equal_the_released_code(golden: dict[str, Tensor], term: str):
    losses = Diffusion().training_losses(network, golden["x0"], golden["t"], golden["noise"])
    assert losses[term].shape == (8,)
    assert relative_error(losses[term], golden[f"loss_{term}"]) < 1e-6
    # Each image by itself, too: the terms span orders of magnitude.
    torch.testing.assert_close(losses[term], golden[f"loss_{term}"], rtol=1e-9, atol=1e-12)


def test_the_variational_term_does_not_teach_the_noise(golden: dict[str, Tensor]):
    x0, t, noise = golden["x0"], golden["t"], golden["noise"]
    answer = network(golden["x_t"], t).requires_grad_()
    losses = Diffusion().training_losses(lambda x, t: answer, x0, t, noise)
    (from_vb,) = torch.autograd.grad(losses["vb"].sum(), answer, retain_graph=True)
    (from_mse,) = torch.autograd.grad(losses["mse"].sum(), answer)
    assert not from_vb[:, :4].any()
    assert (from_vb[:, 4:] != 0).any(dim=(1, 2, 3)).all()
    assert not from_mse[:, 4:].any()
    torch.testing.assert_close(from_mse[:, :4], 2 * (answer[:, :4] - noise) / noise[0].numel())


def test_bfloat16_answers_are_scored_in_float32(golden: dict[str, Tensor]):
    x0, t, noise = golden["x0"].float(), golden["t"], golden["noise"].float()
    answer = network(golden["x_t"], t).bfloat16()
    diffusion = Diffusion()
    low = diffusion.training_losses(lambda x, t: answer, x0, t, noise)
    high = diffusion.training_losses(lambda x, t: answer.double(), x0.double(), t, noise.double())
    for term in ("loss", "mse", "vb"):
        assert low[term].dtype == torch.float32
        assert high[term].dtype == torch.float64
        assert relative_error(low[term].double(), high[term]) < 1e-4


def test_half_precision_latents_are_noised_in_float32(golden: dict[str, Tensor]):
    x0, t, noise = golden["x0"].bfloat16(), golden["t"], golden["noise"].bfloat16()
    x_t = Diffusion().q_sample(x0, t, noise)
    assert x_t.dtype == torch.float32
    expected = Diffusion().q_sample(x0.double(), t, noise.double())
    torch.testing.assert_close(x_t.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_model_without_variance_has_the_squared_error_alone(golden: dict[str, Tensor]):
    x0, t, noise = golden["x0"], golden["t"], golden["noise"]
    losses = Diffusion().training_losses(lambda x, t: network(x, t)[:, :4], x0, t, noise)
    assert not losses["vb"].any()
    torch.testing.assert_close(losses["mse"], golden["loss_mse"], rtol=1e-6, atol=1e-6)
    assert torch.equal(losses["loss"], losses["mse"])


def test_refuses_other_channel_counts(golden: dict[str, Tensor]):
    with pytest.raises(ValueError, match=r"3 channels.*in_channels=4"):
        Diffusion().training_losses(lambda x, t: x[:, :3], golden["x0"], golden["t"], golden["noise"])


def test_keyword_arguments_reach_the_model(golden: dict[str, Tensor]):
    seen = {}

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen["y"] = y
        return network(x, t)

    labels = torch.arange(8)
    Diffusion().training_losses(model, golden["x0"], golden["t"], golden["noise"], y=labels)
    assert seen["y"] is labels


def test_a_perfect_model_reaches_the_least_variational_bound():
    # With the true noise and the posterior's variance (v = -1), the divergence is zero at every t > 0.
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64).unbind(0)
    t = torch.tensor([1, 2, 100, 500, 999])
    answer = torch.cat([noise, torch.full_like(noise, -1)], dim=1)
    losses = Diffusion().training_losses(lambda x, t: answer, x0, t, noise)
    torch.testing.assert_close(losses["loss"], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-8)


def test_kl_equals_torch():
    torch.manual_seed(0)
    mean_p, log_p, mean_q, log_q = torch.randn(4, 100, dtype=torch.float64).unbind(0)
    p = torch.distributions.Normal(mean_p, (0.5 * log_p).exp())
    q = torch.distributions.Normal(mean_q, (0.5 * log_q).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(mean_p, log_p, mean_q, log_q), expected)


def test_bin_probabilities_sum_to_one():
    # The bins -1, -1 + 2/255 .. 1 cover the real line, the outermost being open.
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.0, 0.3), (0.9, 0.5), (-2.0, 1.0)):
        log_variance = torch.full_like(bins, 2 * math.log(std))
        total = discretized_log_likelihood(bins, torch.full_like(bins, mean), log_variance).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-6)


def test_unlikely_bins_keep_a_finite_logarithm_and_gradient():
    mean = torch.tensor([50.0, -50.0, 1e4], requires_grad=True)
    likelihood = discretized_log_likelihood(torch.tensor([-1.0, 1.0, 0.0]), mean, torch.full((3,), -9.0))
    torch.testing.assert_close(likelihood, torch.full((3,), math.log(1e-12)))
    likelihood.sum().backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()


def test_interpolation_runs_from_the_posterior_to_beta():
    v = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(interpolated_log_variance(v, -2.0, -6.0), torch.tensor([-6.0, -4.0, -2.0]))


def test_traces_into_one_graph(golden: dict[str, Tensor]):
    arguments = [golden[name] for name in ("x0", "t", "noise")]
    diffusion = Diffusion()
    expected = diffusion.training_losses(network, *arguments)
    traced = torch.compile(diffusion.training_losses, fullgraph=True, backend="eager")(network, *arguments)
    torch.testing.assert_close(traced, expected)
