from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_ray.diffusion import Diffusion, Guidance, Sampler, guided_output
from dico_ray.models import DiCo

GOLDEN = Path(__file__).parents[1] / "golden"
DIFFUSION = Diffusion()


def network(x: Tensor, t: Tensor) -> Tensor:
    """The function that the golden values were computed with."""
    s = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(0.9 * x + 0.1 * s), torch.sin(3 * x + s)], dim=1)


class Labelled:
    """A network of labels, which remembers the batch size and timestep of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((len(x), int(t[0])))
        return network(x, t) + 0.1 * y.view(-1, 1, 1, 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def latents(batch: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "diffusion.npz") as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive}


@pytest.mark.parametrize("steps", [250, 50, 10])
def test_means_and_variances_equal_the_released_code(golden: dict[str, Tensor], steps: int):
    sampler = Sampler(DIFFUSION, steps)
    results = [sampler.mean_log_variance(network, golden["x0"][:4], int(i)) for i in golden[f"kept_{steps}"]]
    means, log_variances = (torch.stack(values) for values in zip(*results, strict=True))
    assert relative_error(means, golden[f"p_mean_{steps}"]) < 1e-6
    assert relative_error(log_variances, golden[f"p_log_variance_{steps}"]) < 1e-6


@pytest.mark.parametrize(("steps", "tolerance"), [(250, 5e-6), (50, 1e-6), (10, 1e-6)])
def test_ddim_equals_the_released_code(golden: dict[str, Tensor], steps: int, tolerance: float):
    # The released code's float32 tables round a little differently here; 250 steps add it up.
    x_0 = Sampler(DIFFUSION, steps, "ddim").sample(network, golden[f"x_T_{steps}"])
    assert relative_error(x_0, golden[f"x_0_ddim_{steps}"]) < tolerance


@pytest.mark.parametrize("steps", [50, 10])
@pytest.mark.parametrize("source", ["tensor", "callable"])
def test_ddpm_equals_the_released_code(golden: dict[str, Tensor], steps: int, source: str):
    recorded, asked = golden[f"noise_{steps}"], []

    def draw(index: int) -> Tensor:
        asked.append(index)
        return recorded[steps - 1 - index]

    noise = recorded if source == "tensor" else draw
    x_0 = Sampler(DIFFUSION, steps).sample(network, golden[f"x_T_{steps}"], noise)
    assert relative_error(x_0, golden[f"x_0_ddpm_{steps}"]) < 1e-6
    if source == "callable":
        assert asked == list(range(steps - 1, 0, -1))


def test_ddpm_draws_its_own_noise_when_none_is_given():
    sampler, x_T = Sampler(DIFFUSION, 10), latents()
    torch.manual_seed(0)
    recorded = [torch.randn_like(x_T) for _ in range(9)]
    torch.manual_seed(0)
    expected = sampler.sample(network, x_T, lambda index: recorded[9 - index])
    assert torch.equal(sampler.sample(network, x_T), expected)


def test_guided_output_equals_the_released_code():
    with np.load(GOLDEN / "model_tiny.npz") as archive:
        tiny = dict(archive)
    width, ratio, classes = (int(tiny[name]) for name in ("hidden_size", "ffn_ratio", "num_classes"))
    model = DiCo(width, tiny["depths"].tolist(), ratio, classes)
    weights = {name[2:]: torch.from_numpy(value) for name, value in tiny.items() if name.startswith("w:")}
    model.load_state_dict(weights)
    model.double().eval()
    x, t, y, expected = (torch.from_numpy(tiny[name]) for name in ("x", "t", "y", "output_cfg"))
    guidance = Guidance(float(tiny["cfg_scale"]), model.null_label)
    with torch.no_grad():
        output = guided_output(model, x, t, y, guidance)
    assert relative_error(output, expected[:4]) < 1e-6


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), ("all", 4), (None, 4)])
def test_guidance_moves_only_the_guided_channels(channels: Any, guided: int):
    model, x, t, y = Labelled(), latents(), torch.tensor([5, 5]), torch.tensor([1, 2])
    conditional, null = model(x, t, y), model(x, t, torch.tensor([9, 9]))
    model.calls.clear()
    output = guided_output(model, x, t, y, Guidance(1.5, null_label=9, channels=channels))
    assert model.calls == [(4, 5)]
    expected = conditional.clone()
    expected[:, :guided] = null[:, :guided] + 1.5 * (conditional - null)[:, :guided]
    torch.testing.assert_close(output, expected)


def test_scale_one_evaluates_the_conditional_network_alone():
    model, x, y = Labelled(), latents(), torch.tensor([1, 2])
    t = torch.tensor([5, 5])
    output = guided_output(model, x, t, y, Guidance(1.0, null_label=9))
    assert torch.equal(output, model(x, t, y))
    Sampler(DIFFUSION, 10, "ddim", Guidance(1.0, null_label=9)).sample(model, x, y=y)
    assert {batch for batch, _ in model.calls} == {2}


def test_guidance_acts_inside_its_interval_both_ends_included():
    model = Labelled()
    sampler = Sampler(DIFFUSION, 10, "ddim", Guidance(2.0, null_label=9, interval=(333, 555)))
    sampler.sample(model, latents(), y=torch.tensor([1, 2]))
    timesteps = [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert model.calls == [(4 if 333 <= t <= 555 else 2, t) for t in timesteps]


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_samples_depend_on_guidance(method: Any):
    x_T, y, noise = latents(), torch.tensor([1, 2]), torch.zeros(10, 2, 4, 4, 4)
    plain = Sampler(DIFFUSION, 10, method).sample(Labelled(), x_T, noise, y=y)
    guided = Sampler(DIFFUSION, 10, method, Guidance(2.0, 9)).sample(Labelled(), x_T, noise, y=y)
    assert relative_error(guided, plain) > 1e-3


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_perfect_network_of_a_normal_distribution_samples_it(method: Any):
    # If x_0 ~ N(0, s^2), the best noise estimate is sqrt(1 - abar) / (abar s^2 + 1 - abar) x_t.
    s, abar = 0.5, torch.from_numpy(DIFFUSION.schedule.alphas_cumprod)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() / (a * s**2 + 1 - a) * x

    torch.manual_seed(0)
    x_0 = Sampler(DIFFUSION, 200, method).sample(model, torch.randn(64, 1, 8, 8, dtype=torch.float64))
    assert x_0.std().item() == pytest.approx(s, rel=0.05)


def test_a_model_without_variance_gets_the_posterior_variance():
    sampler = Sampler(DIFFUSION, 10)
    mean, log_variance = sampler.mean_log_variance(lambda x, t: network(x, t)[:, :4], latents(), 5)
    expected, _ = sampler.mean_log_variance(network, latents(), 5)
    assert torch.equal(mean, expected)
    expected = torch.full_like(mean, float(sampler.schedule.posterior_log_variance[5]))
    torch.testing.assert_close(log_variance, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_short_answers_are_computed_with_in_float32(method: Any, dtype: torch.dtype):
    noise = torch.zeros(10, 2, 4, 4, 4)
    x_0 = Sampler(DIFFUSION, 10, method).sample(lambda x, t: network(x, t).bfloat16(), latents().to(dtype), noise)
    assert x_0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = Sampler(DIFFUSION, 10, method).sample(network, latents(), noise)
    assert relative_error(x_0.double(), exact) < 0.05


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_single_step_is_finite(method: Any):
    x_0 = Sampler(DIFFUSION, 1, method).sample(network, latents())
    assert x_0.isfinite().all()


def test_sampling_keeps_no_graph():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not Sampler(DIFFUSION, 10).sample(lambda x, t: weight * network(x, t), latents()).requires_grad


def test_timesteps_are_known():
    assert Sampler(DIFFUSION, 10).timesteps.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert len(Sampler(DIFFUSION, 250)) == 250


def test_refuses_settings_outside_their_range():
    with pytest.raises(ValueError, match="ddpm, ddim"):
        Sampler(DIFFUSION, 10, "euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 1000"):
        Sampler(DIFFUSION, 1001)
    with pytest.raises(ValueError, match=r"noise has shape \(9, 2.*\(10, 2"):
        Sampler(DIFFUSION, 10).sample(network, latents(), torch.zeros(9, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="guidance needs the labels y"):
        Sampler(DIFFUSION, 10, guidance=Guidance(1.4, 9)).sample(network, latents())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"null_label": -1}, "null_label"),
        ({"channels": 0}, "channels"),
        ({"channels": "some"}, "channels"),
        ({"interval": (5, 4)}, "interval"),
        ({"interval": (-1, 4)}, "interval"),
    ],
)
def test_refuses_impossible_guidance(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Guidance(**({"scale": 1.4, "null_label": 9} | wrong))


def test_refuses_to_guide_more_channels_than_there_are():
    with pytest.raises(ValueError, match="3 channels are to be guided, but the latents have 2"):
        guided_output(Labelled(), latents(channels=2), torch.zeros(2), torch.zeros(2), Guidance(1.4, 9))
