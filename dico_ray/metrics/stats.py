"""Moments of features, and the Frechet distance between two sets of them: add, merge, then compute."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features that arrive in batches, on any number of workers, in float64.

    Holds the count, the mean and the scatter sum (x - mean)(x - mean)^T, not the plain sums of x and x x^T:
    the difference of those loses 2 log10(mean / deviation) of its 16 digits. Batches and workers join by the
    pairwise update of Chan, Golub and LeVeque (1979), so merged parts equal the whole up to rounding.

    Args:
        dim: the number of features D.
        device: where to accumulate; must know float64. Features are moved there.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}: it is the number of features, at least 1")
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: np.ndarray | Tensor) -> None:
        """Take in features (N, D) of any real type; N may be 0.

        Raises:
            ValueError: another shape, or a NaN or infinity; nothing of the batch is taken in then.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, {self.dim})")
        batch = torch.as_tensor(features).detach().to(self._mean.device, torch.float64)
        if len(batch) == 0:
            return
        self._refuse_nonfinite(batch)
        mean, total = batch.mean(dim=0), self.count + len(batch)
        delta = mean - self._mean
        # What the two means' distance adds is one more row: a single product, and no pass over D x D besides it.
        rows = torch.cat([batch - mean, delta[None] * math.sqrt(self.count * len(batch) / total)])
        self._scatter.addmm_(rows.T, rows)
        self._mean = self._mean + delta * (len(batch) / total)
        self.count = total

    def merge(self, other: Moments) -> Moments:
        """Take in all that `other` has seen, and return self; `other` is unchanged.

        Raises:
            ValueError: other has another number of features.
        """
        if other.dim != self.dim:
            raise ValueError(f"cannot merge moments of {other.dim} features into moments of {self.dim}")
        device = self._mean.device
        self._join(other.count, other._mean.to(device), other._scatter.to(device))
        return self

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), divided by count - 1 as `np.cov` does; float64.

        Raises:
            ValueError: fewer than 2 samples, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(
                f"a covariance needs at least 2 samples, these moments hold {self.count}: "
                "check that the images reached the feature network"
            )
        return self._mean.cpu().numpy().copy(), (self._scatter / (self.count - 1)).cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        """All it holds, as arrays to save or send: count () int64, mean (D,) and scatter (D, D) float64."""
        return {
            "count": np.asarray(self.count, dtype=np.int64),
            "mean": self._mean.cpu().numpy().copy(),
            "scatter": self._scatter.cpu().numpy().copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], device: str | torch.device = "cpu") -> Moments:
        """The moments whose `state()` this is, bit for bit.

        Raises:
            ValueError: an array is missing or of the wrong shape, or holds a NaN or infinity.
        """
        missing = {"count", "mean", "scatter"} - set(state)
        if missing:
            raise ValueError(f"the saved moments lack {sorted(missing)}; they have {sorted(state)}")
        count, mean, scatter = int(state["count"]), np.asarray(state["mean"]), np.asarray(state["scatter"])
        if count < 0 or mean.ndim != 1 or scatter.shape != (mean.size, mean.size):
            raise ValueError(
                f"the saved moments have count {count}, mean {mean.shape} and scatter {scatter.shape}; "
                "expected a count of 0 or more, (D,) and (D, D)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise ValueError("the saved moments hold a NaN or infinity: the file is damaged, make it again")
        moments = cls(mean.size, device)
        # Copies: torch would share the caller's memory, and add to it in place.
        moments.count = count
        moments._mean = torch.tensor(mean, dtype=torch.float64, device=device)
        moments._scatter = torch.tensor(scatter, dtype=torch.float64, device=device)
        return moments

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        # Not in place: `other` of a merge may be self.
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def _refuse_nonfinite(self, batch: Tensor) -> None:
        bad = ~batch.isfinite()
        rows = bad.any(dim=1).nonzero().flatten().tolist()
        if rows:
            column = int(bad[rows[0]].nonzero()[0])
            raise ValueError(
                f"{len(rows)} of {len(batch)} feature rows are not finite; the first is row {rows[0]} of "
                f"this batch (sample {self.count + rows[0]} of these moments), feature {column} is "
                f"{batch[rows[0], column].item()}: look at that row's image for NaN pixels (a sampler that "
                "diverged), then at the feature network's precision"
            )


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance between two Gaussians; FID when the features are Inception's.

    arXiv 1706.08500, eq. (6): |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64.

    sigma1 sigma2 has the eigenvalues of the symmetric sqrt(sigma1) sigma2 sqrt(sigma1), and their roots are
    the singular values of sqrt(sigma1) sqrt(sigma2). Those are taken directly: the root of an eigenvalue
    that is 1e-16 instead of 0 is 1e-8, and a rank-deficient covariance (fewer samples than features) has
    many. No matrix root of a product that is not symmetric, so no imaginary part to drop.

    Args:
        mu1, mu2: means (D,).
        sigma1, sigma2: covariances (D, D): symmetric, no negative eigenvalue, any rank.

    Raises:
        ValueError: shapes that do not fit each other, a NaN or infinity, or a sigma that is no covariance.
    """
    mean1, covariance1 = _checked("1", mu1, sigma1)
    mean2, covariance2 = _checked("2", mu2, sigma2)
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"mu1 has {mean1.size} features and mu2 has {mean2.size}: both must come from the same feature network"
        )
    root1, root2 = _factor("sigma1", covariance1), _factor("sigma2", covariance2)
    trace_of_root = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    distance = np.square(mean1 - mean2).sum() + covariance1.trace() + covariance2.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # equal Gaussians may come out at minus one rounding error


def _checked(which: str, mu: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"mu{which} has shape {mean.shape} and sigma{which} {covariance.shape}; expected (D,) and "
            "(D, D), as Moments.compute() returns them"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"mu{which} or sigma{which} holds a NaN or infinity: compute those moments again")
    scale = np.abs(covariance).max(initial=0.0)
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * scale):
        raise ValueError(f"sigma{which} is not symmetric, so it is no covariance: check what was loaded as it")
    return mean, (covariance + covariance.T) / 2


def _factor(name: str, covariance: np.ndarray) -> np.ndarray:
    """F (D, r) with F F^T = covariance; r leaves out eigenvalues that are zero up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    largest = max(values.max(initial=0.0), 0.0)
    if values.size and values.min() < -1e-3 * largest - 1e-300:
        raise ValueError(
            f"{name} has the eigenvalue {values.min():.3g} beside a largest of {largest:.3g}; a covariance "
            "has none below zero: check what was loaded as it"
        )
    kept = values > largest * values.size * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
