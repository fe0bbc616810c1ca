"""The forward process and the training loss (DDPM, arXiv 2006.11239; iDDPM, arXiv 2102.09672)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dico_ray.diffusion.schedule import Schedule

Model = Callable[..., Tensor]

# Latents are treated as 8-bit values in [-1, 1]: bins 2/255 wide, the outermost open (DDPM, equation 13).
HALF_BIN = 1 / 255
OPEN_EDGE = 0.999
LEAST_PROBABILITY = 1e-12


class Diffusion:
    """A Gaussian diffusion with linear betas, whose network predicts noise and a variance interpolation.

    Args:
        num_steps: timesteps of the process, T; timesteps run from 0 to T - 1.

    Raises:
        ValueError: num_steps too small for the linear schedule.
    """

    def __init__(self, num_steps: int = 1000) -> None:
        self.schedule = Schedule.linear(num_steps)
        self.num_steps = num_steps
        columns = self.schedule.coefficients()
        self._names = tuple(columns)
        self._tables = {torch.device("cpu"): torch.stack([torch.from_numpy(table) for table in columns.values()])}

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise clean latents: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, DDPM equation (4).

        Args:
            x0: clean latents `(B, C, H, W)`.
            t: int64 timesteps `(B,)` in [0, num_steps).
            noise: standard normal, `(B, C, H, W)`.

        Returns:
            `(B, C, H, W)`, float32, or float64 if x0 or noise is.
        """
        dtype = computing_dtype(x0, noise)
        at = self._coefficients(t, dtype)
        return at["sqrt_abar"] * x0.to(dtype) + at["sqrt_one_minus_abar"] * noise.to(dtype)

    def training_losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The hybrid loss of iDDPM, equation (16), with weight 1 for its variational term.

        The noise is learned by the squared error alone: it enters the variational term detached.

        Args:
            model: called as `model(x_t, t, **kwargs)`; answers `(B, 2C, H, W)`, noise then v, or
                `(B, C, H, W)`, noise alone, in which case "vb" is zero.
            x0, t, noise: as in `q_sample`.

        Returns:
            "mse", mean squared error of the noise; "vb", the variational term in bits per latent value;
            "loss", their sum. Each `(B,)`, float32, or float64 if x0, noise or the model's answer is.

        Raises:
            ValueError: the model answers with another number of channels.
        """
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t, t, **kwargs)
        dtype = computing_dtype(x_t, output)
        predicted, interpolation = split_output(output.to(dtype), channels=x0.shape[1])
        mse = per_image_mean((noise.to(dtype) - predicted) ** 2)
        if interpolation is None:
            vb = torch.zeros_like(mse)
        else:
            vb = self._variational_bits(x0.to(dtype), x_t.to(dtype), t, predicted.detach(), interpolation)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bits(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, v: Tensor) -> Tensor:
        """One term of the variational bound, DDPM equation (5), in bits per value: `(B,)`."""
        at = self._coefficients(t, x0.dtype)
        true_mean = at["mean_x0"] * x0 + at["mean_xt"] * x_t
        predicted_x0 = at["sqrt_recip_abar"] * x_t - at["sqrt_recip_abar_minus_one"] * noise
        mean = at["mean_x0"] * predicted_x0 + at["mean_xt"] * x_t
        log_variance = interpolated_log_variance(v, at["log_beta"], at["log_posterior"])
        divergence = gaussian_kl(true_mean, at["log_posterior"], mean, log_variance)
        likelihood = discretized_log_likelihood(x0, mean, log_variance)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return per_image_mean(nats) / math.log(2)

    def _coefficients(self, t: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every table's entry at the timesteps, each `(B, 1, 1, 1)`."""
        tables = self._tables.get(t.device)
        if tables is None:
            # One copy for each device, kept: a copy in every step would make the host wait.
            tables = self._tables[torch.device("cpu")].to(t.device)
            self._tables[t.device] = tables
        columns = tables[:, t].to(dtype).unbind(0)
        return {name: column.view(-1, 1, 1, 1) for name, column in zip(self._names, columns, strict=True)}


def computing_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: differences of means drown in anything shorter."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's answer into noise `(B, C, H, W)` and v `(B, C, H, W)`, or None where it has no v.

    Raises:
        ValueError: the answer has neither C nor 2C channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        noise, interpolation = output.chunk(2, dim=1)
        return noise, interpolation
    raise ValueError(
        f"the model answered with {output.shape[1]} channels; latents of {channels} channels need {channels} "
        f"(noise) or {2 * channels} (noise and variance): build it with in_channels={channels}"
    )


def interpolated_log_variance(v: Tensor, log_beta: Tensor | float, log_posterior: Tensor | float) -> Tensor:
    """v in [-1, 1] (not enforced) -> log variance from the posterior's to beta's: iDDPM equation (15)."""
    share = (v + 1) / 2
    return share * log_beta + (1 - share) * log_posterior


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of two normal distributions, value by value, in nats."""
    ratio = torch.exp(log_var_p - log_var_q)
    return 0.5 * (log_var_q - log_var_p - 1 + ratio + (mean_p - mean_q) ** 2 * torch.exp(-log_var_q))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability (nats) of the 8-bit bin around x under a normal distribution: DDPM equation (13).

    Bins are 2/255 wide; beyond |x| = 0.999 they are open to infinity. Probabilities are at least 1e-12.
    """
    scale = torch.exp(-0.5 * log_variance)
    below_upper = approximate_normal_cdf((x - mean + HALF_BIN) * scale)
    below_lower = approximate_normal_cdf((x - mean - HALF_BIN) * scale)
    probability = torch.where(x > OPEN_EDGE, 1 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -OPEN_EDGE, below_upper, probability)
    return probability.clamp(min=LEAST_PROBABILITY).log()


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function, as in the released losses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def per_image_mean(values: Tensor) -> Tensor:
    """Mean over all but the batch: `(B, ...)` -> `(B,)`."""
    return values.flatten(1).mean(dim=1)
