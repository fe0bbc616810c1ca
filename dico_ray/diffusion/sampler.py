"""Sampling: DDPM's ancestral steps, DDIM, and classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dico_ray.diffusion.process import (
    Diffusion,
    Model,
    computing_dtype,
    interpolated_log_variance,
    split_output,
)
from dico_ray.diffusion.schedule import spaced_timesteps

METHODS = ("ddpm", "ddim")

Noise = Tensor | Callable[[int], Tensor] | None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + scale (c - u), from the conditional c and the unconditional u.

    Equation (6) of arXiv 2207.12598 with scale = 1 + w; its scale 1 is no guidance at all.

    Args:
        scale: guidance scale, finite, at least 0.
        null_label: the label that means no class, `model.null_label`.
        channels: how many of the first noise channels are guided; "all" or None for every one. The published
            DiCo figures guide 3 of 4.
        interval: (lo, hi), original timesteps, both included, in which guidance acts (arXiv 2404.07724).
            Outside of it only the conditional network is evaluated, at half the cost. None: everywhere.

    Raises:
        ValueError: a setting outside its range.
    """

    scale: float
    null_label: int
    channels: int | Literal["all"] | None = 3
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance scale is {self.scale}; it must be a finite number of at least 0")
        if self.null_label < 0:
            raise ValueError(f"null_label is {self.null_label}; pass the model's null_label, its num_classes")
        if isinstance(self.channels, str):
            valid = self.channels == "all"
        else:
            valid = self.channels is None or self.channels >= 1
        if not valid:
            raise ValueError(f'guided channels are {self.channels!r}; give a number of at least 1, or "all"')
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance interval is {self.interval}; it must be (lo, hi) with 0 <= lo <= hi")

    def acts_at(self, timestep: int) -> bool:
        """Whether this original timestep lies in the interval."""
        return self.interval is None or self.interval[0] <= timestep <= self.interval[1]

    def doubles_at(self, timestep: int) -> bool:
        """Whether the network is evaluated on two rows an image there: within the interval, at a scale but 1."""
        return self.acts_at(timestep) and self.scale != 1


def guided_output(model: Model, x: Tensor, t: Tensor, y: Tensor, guidance: Guidance) -> Tensor:
    """Evaluate the model on the doubled batch [conditional; null] and guide the noise it predicts.

    What is not guided, the remaining noise channels and v, stays the conditional half's own. At scale 1 the
    batch is not doubled. The interval is the caller's to heed: t is a tensor here.

    Args:
        model: called once, as `model(x, t, y=y)` with 2B rows; answers `(2B, C or 2C, H, W)`.
        x: latents `(B, C, H, W)`; t: timesteps `(B,)`; y: labels `(B,)`.

    Returns:
        `(B, C or 2C, H, W)`.

    Raises:
        ValueError: more channels are to be guided than the latents have.
    """
    guided = x.shape[1] if guidance.channels in (None, "all") else int(guidance.channels)
    if guided > x.shape[1]:
        raise ValueError(
            f"{guided} channels are to be guided, but the latents have {x.shape[1]}: "
            f'lower the guided channels, or set them to "all"'
        )
    if guidance.scale == 1:
        return model(x, t, y=y)
    null = torch.full_like(y, guidance.null_label)
    output = model(torch.cat([x, x]), torch.cat([t, t]), y=torch.cat([y, null]))
    conditional, unconditional = output.chunk(2)
    u, c = unconditional[:, :guided], conditional[:, :guided]
    return torch.cat([u + guidance.scale * (c - u), conditional[:, guided:]], dim=1)


def predict(
    model: Model, x: Tensor, timestep: int, guidance: Guidance | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, the (guided) noise in them and v (or None) at an original timestep, in the dtype to compute in.

    Raises:
        ValueError: guidance without the labels y, or with more than them; another number of channels.
    """
    # Filled on the device: nothing is copied there, so the host runs ahead of it.
    t = torch.full((x.shape[0],), timestep, dtype=torch.int64, device=x.device)
    if guidance is not None and guidance.acts_at(timestep):
        if kwargs.keys() != {"y"}:
            raise ValueError(f"guidance needs the labels y and nothing else; sample got {sorted(kwargs)}")
        output = guided_output(model, x, t, kwargs["y"], guidance)
    else:
        output = model(x, t, **kwargs)
    dtype = computing_dtype(x, output)
    noise, v = split_output(output.to(dtype), channels=x.shape[1])
    return x.to(dtype), noise, v


def network_rows(timesteps: Sequence[int], guidance: Guidance | None) -> int:
    """Rows that a network is evaluated on for one image, given the timesteps of all its evaluations."""
    return sum(2 if guidance is not None and guidance.doubles_at(t) else 1 for t in timesteps)


def check_noise(noise: Noise, x_T: Tensor, steps: int) -> None:
    """Raises ValueError for a noise tensor that is not `(N, B, C, H, W)`."""
    if isinstance(noise, Tensor) and tuple(noise.shape) != (steps, *x_T.shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; {steps} steps of latents {tuple(x_T.shape)} need "
            f"{(steps, *x_T.shape)}"
        )


def draw(noise: Noise, x: Tensor, index: int, steps: int) -> Tensor:
    """The draw of step index i of N, `(B, C, H, W)` in the dtype of x; where noise comes from: `Sampler.sample`."""
    if noise is None:
        return torch.randn_like(x)
    drawn = noise[steps - 1 - index] if isinstance(noise, Tensor) else noise(index)
    return drawn.to(x.dtype)


class Sampler:
    """Turns noise into latents in a number of steps.

    Args:
        diffusion: the process the network was trained with.
        steps: number of steps N, 1 .. diffusion.num_steps, spaced by `spaced_timesteps`.
        method: "ddpm", ancestral steps (arXiv 2006.11239) with the learned variance of iDDPM
            (arXiv 2102.09672), or "ddim" with eta 0 (arXiv 2010.02502), which draws no noise.
        guidance: classifier-free guidance; the model is then called with `y` as its only keyword.

    Attributes:
        timesteps: int64 numpy array `(N,)`, ascending: the original timestep of each step index.

    Raises:
        ValueError: steps or method outside their range.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        steps: int,
        method: Literal["ddpm", "ddim"] = "ddpm",
        guidance: Guidance | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
        self.timesteps = spaced_timesteps(diffusion.num_steps, steps)
        self.schedule = diffusion.schedule.respaced(self.timesteps)
        tables = self.schedule.coefficients()
        # Python floats: a step's factors ride along with the kernel launches instead of being copied.
        self._coefficients = {name: table.tolist() for name, table in tables.items()}
        self.method = method
        self.guidance = guidance

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def network_rows(self) -> int:
        """Rows that the network is evaluated on for one image."""
        return network_rows(self.timesteps.tolist(), self.guidance)

    def mean_log_variance(self, model: Model, x: Tensor, index: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the step p(x_{i-1} | x_i): DDPM equation (7), iDDPM equation (15).

        A model that predicts no variance gets the posterior's, the lower bound in DDPM.

        Args:
            model: called as `model(x, t, **kwargs)` with the original timesteps.
            x: latents x_i, `(B, C, H, W)`.
            index: step index i in [0, N); 0 is the least noisy.

        Returns:
            Two tensors `(B, C, H, W)`, float32 or float64.
        """
        x, noise, v = predict(model, x, int(self.timesteps[index]), self.guidance, kwargs)
        at = {name: table[index] for name, table in self._coefficients.items()}
        mean = at["mean_x0"] * self._predicted_x0(x, noise, index) + at["mean_xt"] * x
        if v is None:
            return mean, torch.full_like(mean, at["log_posterior"])
        return mean, interpolated_log_variance(v, at["log_beta"], at["log_posterior"])

    @torch.no_grad()
    def sample(self, model: Model, x_T: Tensor, noise: Noise = None, **kwargs: Any) -> Tensor:
        """Run every step, from index N - 1 down to 0.

        Args:
            model: called as `model(x, t, **kwargs)`; answers `(B, C or 2C, H, W)`.
            x_T: standard normal noise `(B, C, H, W)`.
            noise: the draws of DDPM's steps: a tensor `(N, B, C, H, W)` whose entry 0 belongs to the first
                step taken, index N - 1; or a callable of the step index, called once each from N - 1 down to
                1, that answers `(B, C, H, W)`; or None for `torch.randn_like`. DDIM does not look at it.

        Returns:
            Scaled latents `(B, C, H, W)`, float32, or float64 if x_T is.

        Raises:
            ValueError: a noise tensor of another shape; guidance without y; another number of channels.
        """
        check_noise(noise, x_T, len(self))
        x = x_T.to(computing_dtype(x_T))
        for index in reversed(range(len(self))):
            x = self.step(model, x, index, noise, **kwargs)
        return x

    def step(self, model: Model, x: Tensor, index: int, noise: Noise = None, **kwargs: Any) -> Tensor:
        """One step, x_i -> x_{i-1}: `(B, C, H, W)` both. Arguments as in `mean_log_variance` and `sample`."""
        if self.method == "ddim":
            return self._ddim_step(model, x, index, kwargs)
        mean, log_variance = self.mean_log_variance(model, x, index, **kwargs)
        # The last step's mean is the result: its variance stands for the bins' width only.
        return mean if index == 0 else mean + (0.5 * log_variance).exp() * draw(noise, x, index, len(self))

    def _ddim_step(self, model: Model, x: Tensor, index: int, kwargs: dict[str, Any]) -> Tensor:
        """DDIM equation (12) with sigma = 0."""
        x, noise, _ = predict(model, x, int(self.timesteps[index]), self.guidance, kwargs)
        at = {name: table[index] for name, table in self._coefficients.items()}
        x0 = self._predicted_x0(x, noise, index)
        return at["sqrt_abar_prev"] * x0 + at["sqrt_one_minus_abar_prev"] * noise

    def _predicted_x0(self, x: Tensor, noise: Tensor, index: int) -> Tensor:
        """Solve DDPM equation (4) for x_0."""
        at = self._coefficients
        return at["sqrt_recip_abar"][index] * x - at["sqrt_recip_abar_minus_one"][index] * noise
