"""Fits to a sweep's results: best learning rate, how it moves with scale, how loss falls with compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_LEVELS = (2.5, 97.5)  # percent: the ends of every interval
_DRAWS = 300
_NEAREST = 5  # points of a parabola: around the best one
_BROKEN = 1.25  # times the best loss: beyond it training broke, which says nothing of where the least lies


@dataclass(frozen=True)
class Optimum:
    """A parabola in log learning rate through one scale's results, and its lowest point.

    lr, loss: where it is lowest. curvature: d2 loss / d(ln lr)2. draws: the optimum's ln lr under the noise of the
    residuals, (draws,); empty with three points, which leave none. inside: it lies strictly inside the rates fitted.
    """

    lr: float
    loss: float
    curvature: float
    draws: np.ndarray
    inside: bool

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% of the draws."""
        return _interval(np.exp(self.draws)) if len(self.draws) else None


def optimum(rates: list[float], losses: list[float], seed: int = 0) -> Optimum | None:
    """Least squares of loss = a + b (ln lr - m)^2 through the five points nearest to the best; None if it has no least.

    Left out are losses that are infinite (diverged) or beyond 1.25 times the best one, where training broke; these
    only if three others remain. Fewer than three: None.
    """
    rows = sorted((r, v) for r, v in zip(rates, losses, strict=True) if math.isfinite(v))
    sound = [(r, v) for r, v in rows if v <= _BROKEN * min(v for _, v in rows)]
    rows = sound if len({r for r, _ in sound}) >= 3 else rows
    if len({r for r, _ in rows}) < 3:
        return None
    x, y = np.log([r for r, _ in rows]), np.array([v for _, v in rows])
    near = np.sort(np.argsort(np.abs(x - x[np.argmin(y)]), kind="stable")[:_NEAREST])
    x, y = x[near], y[near]
    fitted = np.polyfit(x, y, 2)
    if fitted[0] <= 0:
        return None
    free = len(x) - 3
    draws = np.empty(0)
    if free:
        residual = y - np.polyval(fitted, x)
        noise = np.random.default_rng(seed).standard_normal((_DRAWS, len(x))) * math.sqrt(residual @ residual / free)
        again = np.polyfit(x, (np.polyval(fitted, x) + noise).T, 2)
        again = again[:, again[0] > 0]
        draws = np.clip(-again[1] / (2 * again[0]), x[0] - 2, x[-1] + 2)
    best = -fitted[1] / (2 * fitted[0])
    return Optimum(
        lr=float(np.exp(best)), loss=float(np.polyval(fitted, best)), curvature=float(2 * fitted[0]), draws=draws,
        inside=bool(x[0] < best < x[-1]),
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """ln y = offset + slope ln x. draws: (draws, 2) of (offset, slope) under the noise of the points; may be empty."""

    offset: float
    slope: float
    draws: np.ndarray

    def at(self, x: float) -> float:
        return math.exp(self.offset + self.slope * math.log(x))

    def interval(self, x: float) -> tuple[float, float] | None:
        """95% of the draws' values at x."""
        return _interval(np.exp(self.draws @ [1.0, math.log(x)])) if len(self.draws) else None


def learning_rate_line(sizes: list[float], optima: list[Optimum]) -> Line | None:
    """Best learning rate against a scale's size, as a power law. None for fewer than two scales.

    Its draws join those of the scales' own parabolas: each scale's optimum moves as its residuals let it.
    """
    if len(sizes) < 2:
        return None
    x, y = np.log(sizes), np.log([o.lr for o in optima])
    slope, offset = np.polyfit(x, y, 1)
    draws = np.empty((0, 2))
    count = min(len(o.draws) for o in optima)
    if count:
        moved = np.stack([o.draws[:count] for o in optima])
        draws = np.polyfit(x, moved, 1)[::-1].T
    return Line(float(offset), float(slope), draws)


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale (compute / unit)^-exponent. draws: (draws, 3) of (floor, scale, exponent)."""

    floor: float
    scale: float
    exponent: float
    unit: float
    draws: np.ndarray

    def at(self, compute: np.ndarray | float) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(compute) / self.unit) ** -self.exponent

    def band(self, compute: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """95% of the draws' losses: lower and upper, each in the shape of `compute`."""
        c = np.asarray(compute, float)[..., None] / self.unit
        values = self.draws[:, 0] + self.draws[:, 1] * c ** -self.draws[:, 2]
        low, high = np.percentile(values, _LEVELS, axis=-1)
        return low, high


def frontier(compute: np.ndarray, loss: np.ndarray, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """The lowest loss of any trial by compute: the best of each logarithmic bin, where it beats all that cost less."""
    keep = np.isfinite(loss)
    compute, loss = compute[keep], loss[keep]
    if not len(compute):
        return compute, loss
    edges = np.geomspace(compute.min(), compute.max() * (1 + 1e-9), bins + 1)
    places = np.clip(np.digitize(compute, edges) - 1, 0, bins - 1)
    best = [min(np.flatnonzero(places == b), key=lambda i: loss[i]) for b in range(bins) if (places == b).any()]
    found: list[int] = []
    for index in sorted(best, key=lambda i: compute[i]):
        if not found or loss[index] < loss[found[-1]]:
            found.append(int(index))
    return compute[found], loss[found]


def power_law(compute: np.ndarray, loss: np.ndarray, seed: int = 0) -> PowerLaw | None:
    """Least squares of loss = floor + scale compute^-exponent, floor >= 0, with a bootstrap over the points.

    None for fewer than four points. The points of a training curve are not independent, so the band tells how well
    the points fix the law, not how far another seed would move it.
    """
    if len(compute) < 4:
        return None
    unit = float(np.exp(np.log(compute).mean()))
    c = compute / unit
    fitted = _fit_power(c, loss)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(_DRAWS):
        chosen = rng.integers(len(c), size=len(c))
        if len(set(chosen.tolist())) >= 3:
            draws.append(_fit_power(c[chosen], loss[chosen]))
    return PowerLaw(*fitted, unit, np.array(draws))


_EXPONENTS = np.geomspace(0.01, 3.0, 60)


def _fit_power(c: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(floor, scale, exponent): linear least squares for each exponent of a grid, and of finer ones around the best."""
    found, step = _best_exponent(c, y, _EXPONENTS), _EXPONENTS[1] / _EXPONENTS[0]
    for _ in range(4):  # to 5e-6 of the exponent: a law over many decades asks for it
        found = _best_exponent(c, y, found[2] * np.geomspace(1 / step, step, 25))
        step **= 1 / 12
    return found


def _best_exponent(c: np.ndarray, y: np.ndarray, exponents: np.ndarray) -> tuple[float, float, float]:
    basis = c[None] ** -exponents[:, None]
    mean = basis.mean(1, keepdims=True)
    spread = ((basis - mean) ** 2).sum(1)
    scale = ((basis - mean) * (y - y.mean())).sum(1) / np.maximum(spread, 1e-300)
    floor = y.mean() - scale * mean[:, 0]
    through_zero = (basis * y).sum(1) / (basis**2).sum(1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0.0)
    rss = ((floor[:, None] + scale[:, None] * basis - y) ** 2).sum(1)
    best = int(np.argmin(np.where(scale > 0, rss, np.inf)))
    return float(floor[best]), float(scale[best]), float(exponents[best])


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, _LEVELS)
    return float(low), float(high)
