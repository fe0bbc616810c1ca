"""Noise schedules: float64 tables of the forward process and its posterior (DDPM, arXiv 2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

FIRST_BETA = 1e-4
LAST_BETA = 0.02
REFERENCE_STEPS = 1000

Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """What the process needs to know of each step, as float64 arrays `(N,)`; index 0 is the least noisy.

    betas are the variances added by each step; alphas_cumprod (abar) the share of the clean signal's variance
    that is left after it, and alphas_cumprod_prev the share before it. The posterior q(x_{i-1} | x_i, x_0)
    has mean `posterior_mean_x0 * x_0 + posterior_mean_xt * x_i`, equations (6) and (7) of DDPM.
    """

    betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    log_betas: Table
    posterior_variance: Table
    posterior_log_variance: Table
    posterior_mean_x0: Table
    posterior_mean_xt: Table

    def __len__(self) -> int:
        return len(self.betas)

    def coefficients(self) -> dict[str, Table]:
        """The factors that training and sampling apply, by name, each `(N,)`: float32 values held in float64.

        Rounded because the released code rounds them: single-precision runs see no difference, and in double
        precision the released figures come out to the last digits (unrounded, the variational term is 3e-6 off).
        """
        exact = {
            "sqrt_abar": np.sqrt(self.alphas_cumprod),
            "sqrt_one_minus_abar": np.sqrt(1 - self.alphas_cumprod),
            "sqrt_abar_prev": np.sqrt(self.alphas_cumprod_prev),
            "sqrt_one_minus_abar_prev": np.sqrt(1 - self.alphas_cumprod_prev),
            "sqrt_recip_abar": np.sqrt(1 / self.alphas_cumprod),
            "sqrt_recip_abar_minus_one": np.sqrt(1 / self.alphas_cumprod - 1),
            "mean_x0": self.posterior_mean_x0,
            "mean_xt": self.posterior_mean_xt,
            "log_beta": self.log_betas,
            "log_posterior": self.posterior_log_variance,
        }
        return {name: table.astype(np.float32).astype(np.float64) for name, table in exact.items()}

    @classmethod
    def from_betas(cls, betas: Table) -> Schedule:
        """Derive every table from the betas `(N,)`.

        Raises:
            ValueError: betas are not one-dimensional, or a value lies outside the open interval (0, 1).
        """
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0 or not np.all((betas > 0) & (betas < 1)):
            raise ValueError(f"betas are {betas}; each must lie between 0 and 1, both excluded")
        alphas_cumprod: Table = np.cumprod(1 - betas, dtype=np.float64)
        previous = np.append(1.0, alphas_cumprod[:-1])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # The first posterior variance is 0: the second's logarithm replaces its own (arXiv 2102.09672).
        # A schedule of a single step has no second; nothing is drawn there, so any finite number serves.
        first = variance[1:2] if len(betas) > 1 else betas
        return cls(
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=previous,
            log_betas=np.log(betas),
            posterior_variance=variance,
            posterior_log_variance=np.log(np.append(first, variance[1:])),
            posterior_mean_x0=betas * np.sqrt(previous) / (1 - alphas_cumprod),
            posterior_mean_xt=(1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        )

    @classmethod
    def linear(cls, num_steps: int) -> Schedule:
        """Betas rising evenly from 1e-4 to 0.02, DDPM's schedule; other counts than 1000 scale both ends.

        Raises:
            ValueError: num_steps is below 21, where the scaled betas would reach 1.
        """
        scale = REFERENCE_STEPS / num_steps if num_steps > 0 else 0.0
        if num_steps < 2 or scale * LAST_BETA >= 1:
            least = int(REFERENCE_STEPS * LAST_BETA) + 1
            raise ValueError(
                f"num_steps is {num_steps}; the linear schedule needs at least {least}. "
                f"To sample in fewer steps, keep the process and lower the sampler's steps"
            )
        return cls.from_betas(np.linspace(scale * FIRST_BETA, scale * LAST_BETA, num_steps))

    def respaced(self, timesteps: NDArray[np.int64]) -> Schedule:
        """The schedule that visits only these timesteps `(N,)`, ascending, with the same abar at each.

        beta_i = 1 - abar_i / abar_{i-1}: iDDPM, arXiv 2102.09672.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return Schedule.from_betas(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def spaced_timesteps(num_steps: int, steps: int) -> NDArray[np.int64]:
    """Choose `steps` of the timesteps 0 .. num_steps - 1, evenly spaced from the first to the last.

    Step i is i (num_steps - 1) / (steps - 1), rounded half to even. A single step is the last timestep, since
    sampling starts from pure noise. This is ADM's spacing (arXiv 2105.05233), not the "leading" one, which
    never sees the last timesteps.

    Returns:
        int64 `(steps,)`, ascending.

    Raises:
        ValueError: steps is not in 1 .. num_steps.
    """
    if not 1 <= steps <= num_steps:
        raise ValueError(
            f"steps is {steps}; sampling takes 1 to {num_steps} steps, the number the process was built with"
        )
    if steps == 1:
        return np.array([num_steps - 1], dtype=np.int64)
    # Fractions round halves exactly; floating-point multiples of a spacing like 9.99 would miss some of them.
    return np.array([round(Fraction(i * (num_steps - 1), steps - 1)) for i in range(steps)], dtype=np.int64)
