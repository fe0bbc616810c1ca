"""EDM2's power-function averages (arXiv 2312.02696), and any other one of them from snapshots, after training.

Such an average weighs the weights of time tau by tau^gamma up to now, so that its width grows with the run. Its
relative width sigma_rel is the standard deviation of that profile over the training so far. Times count
finished optimizer steps; all is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_PREFIX = "ema-"
_RCOND = 1e-13


def kind(sigma_rel: float) -> str:
    """The name under which an average is kept: `ema-0.050`, three decimals."""
    return f"{_PREFIX}{sigma_rel:.3f}"


def sigma_of(kind: str) -> float:
    """`ema-0.050` -> 0.05."""
    return float(kind.removeprefix(_PREFIX))


def sigma_rel_of(gamma: float) -> float:
    """Exponent of a profile (>= 0) -> its relative width, in (0, 1 / sqrt(12)] (arXiv 2312.02696)."""
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


def gamma_of(sigma_rel: float) -> float:
    """Relative width of a profile, in (0, 1 / sqrt(12)], -> its exponent, >= 0 (arXiv 2312.02696).

    Raises ValueError outside that range.
    """
    if not 0 < sigma_rel <= sigma_rel_of(0):
        raise ValueError(f"sigma_rel {sigma_rel}: must lie in (0, {sigma_rel_of(0):.4f}]")
    # sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 has one root with gamma >= 0, the largest.
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def decay(step: int, gamma: float) -> float:
    """beta_gamma(step): what an average keeps of itself in its step-th update, step >= 1; 0 in the first."""
    return (1 - 1 / step) ** (gamma + 1)


def inner(step_a: ArrayLike, gamma_a: ArrayLike, step_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[np.float64]:
    """Integral of the product of two profiles, each p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1) on [0, step].

    Arguments broadcast; steps > 0, gammas >= 0. Unit: 1 / step.
    """
    ta, ga, tb, gb = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (step_a, gamma_a, step_b, gamma_b)))
    late = np.where(ta < tb, gb, ga)  # exponent of the one that goes on alone
    ratio = (np.minimum(ta, tb) / np.maximum(ta, tb)) ** late
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * ratio / np.maximum(ta, tb)


def weights(snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> NDArray[np.float64]:
    """Factors (N,) of N snapshots (step, sigma_rel) whose sum is nearest to the average of `sigma_rel` at `step`.

    Least squares between the profiles (arXiv 2312.02696, post-hoc EMA), with one thing more: the factors sum to 1.
    Most of a network's weights hardly move, and a sum of 0.99 would shrink them all; it costs next to nothing in
    the profile. Raises ValueError without snapshots, or for a width outside (0, 1 / sqrt(12)].
    """
    gram, target, norms, norm = _system(snapshots, step, sigma_rel)
    # Profiles of length one: then the matrix is as well conditioned as their directions allow.
    sums = norm / norms
    free, along = np.linalg.lstsq(gram, np.stack([target, sums], axis=1), rcond=_RCOND)[0].T
    return (free + (1 - sums @ free) / (sums @ along) * along) * sums


def error(snapshots: Sequence[tuple[int, float]], factors: NDArray[np.float64], step: int, sigma_rel: float) -> float:
    """L2 distance of the factors' profile from the one that was wanted, over the latter's norm; good to 1e-7."""
    gram, target, norms, norm = _system(snapshots, step, sigma_rel)
    x = factors * norms / norm
    return float(np.sqrt(max(0.0, 1 - 2 * x @ target + x @ gram @ x)))


def _system(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Cosines between the snapshots' profiles (N, N) and with the wanted one (N,); norms (N,) and its norm."""
    if not snapshots:
        raise ValueError("there are no snapshots to reconstruct from")
    steps = np.array([s for s, _ in snapshots], np.float64)
    gammas = np.array([gamma_of(width) for _, width in snapshots])
    gamma = gamma_of(sigma_rel)
    norms = np.sqrt(inner(steps, gammas, steps, gammas))
    norm = float(np.sqrt(inner(step, gamma, step, gamma)))
    gram = inner(steps[:, None], gammas[:, None], steps, gammas) / (norms[:, None] * norms)
    return gram, inner(steps, gammas, step, gamma) / (norms * norm), norms, norm
