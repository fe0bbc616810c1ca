"""A sweep's results -> what it found: each scale's optimum, how it scales, the winner, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dico_ray.arithmetic import parameter_count, training_flops
from dico_ray.config import Config
from dico_ray.scaling.fits import Line, Optimum, PowerLaw, frontier, learning_rate_line, optimum, power_law
from dico_ray.scaling.scales import scaled
from dico_ray.scaling.trials import Trial, kind_of

_FIRST = 0.05  # of a run: what comes before is warm-up, and no point of the frontier


@dataclass(frozen=True)
class Result:
    """What a trial came to. value: the metric over its last part; infinite if it diverged. complete: full length.

    curve: (points, 2) of step and metric, as logged.
    """

    trial: Trial
    steps: int
    value: float
    curve: np.ndarray = field(repr=False)
    complete: bool = True

    @property
    def flops_per_step(self) -> float:
        config = self.trial.config
        return float(training_flops(config.model)) * config.train.global_batch


def tail_mean(curve: np.ndarray, steps: int, share: float) -> float:
    """The metric's mean over the last `share` of so many steps, at least one point. curve: (points, 2) step, metric."""
    seen = curve[curve[:, 0] <= steps]
    late = seen[seen[:, 0] > steps * (1 - share)]
    return float((late if len(late) else seen[-1:])[:, 1].mean())


@dataclass(frozen=True)
class ScaleFound:
    """One scale's results. optimum: None if its trials hold no least, or too few were trained to the end.

    fitted: the results that the optimum rests on.
    """

    scale: str
    config: Config
    results: list[Result]
    fitted: list[Result]
    optimum: Optimum | None

    @property
    def best(self) -> Result:
        return min((r for r in self.results if r.complete), key=lambda r: (r.value, r.trial.key))

    @property
    def trusted(self) -> Optimum | None:
        """The optimum, if it lies strictly inside the rates it was fitted to."""
        return self.optimum if self.optimum and self.optimum.inside else None

    @property
    def expected(self) -> tuple[float, float]:
        """Learning rate and loss: the fitted ones where they can be trusted, otherwise the best trial's."""
        best = self.best
        return (self.trusted.lr, self.trusted.loss) if self.trusted else (best.trial.lr, best.value)

    @property
    def compute(self) -> float:
        """Floating-point operations of one trial of full length."""
        return self.config.train.steps * float(training_flops(self.config.model)) * self.config.train.global_batch


def scale_found(results: list[Result], seed: int = 0) -> ScaleFound:
    """All results of one scale; the optimum is fitted at the other settings that its best trial has."""
    complete = [r for r in results if r.complete]
    best = min(complete, key=lambda r: (r.value, r.trial.key))
    same = [r for r in complete if r.trial.others == best.trial.others]
    fitted = same if len({r.trial.lr for r in same}) >= 3 else complete
    found = optimum([r.trial.lr for r in fitted], [r.value for r in fitted], seed)
    return ScaleFound(best.trial.scale, best.trial.config, results, fitted, found)


@dataclass(frozen=True)
class Found:
    """The whole sweep. frontier: compute and loss of its points; law, line: None if there is too little to fit.

    With sweep.compare: what was found with the winner's value, `kind`; kinds: the same for each value.
    """

    config: Config
    metric: str
    scales: list[ScaleFound]
    frontier: tuple[np.ndarray, np.ndarray]
    law: PowerLaw | None
    line: Line | None
    kind: str = ""
    kinds: tuple[Found, ...] = ()

    @property
    def every(self) -> tuple[Found, ...]:
        """What was found with each value of sweep.compare; itself alone without."""
        return self.kinds or (self,)

    @property
    def octaves(self) -> float:
        """How far the scales' best learning rates lie apart: the logarithm to base 2 of the largest over the least."""
        rates = [s.expected[0] for s in self.scales]
        return math.log2(max(rates) / min(rates))

    @property
    def winner(self) -> ScaleFound:
        return min(self.scales, key=lambda s: s.expected[1])


def found(config: Config, metric: str, scales: list[ScaleFound]) -> Found:
    """scales: each one's results, with sweep.compare each value's for itself. Sorted by parameters."""
    kinds: dict[str, list[ScaleFound]] = {}
    for scale in scales:
        kinds.setdefault(kind_of(config, scale.best.trial), []).append(scale)
    each = [_found(config, metric, kind, some) for kind, some in kinds.items()]
    best = min(each, key=lambda f: f.winner.expected[1])
    return replace(best, kinds=tuple(each)) if config.sweep.compare else best


def _found(config: Config, metric: str, kind: str, scales: list[ScaleFound]) -> Found:
    scales = sorted(scales, key=lambda s: parameter_count(s.config.model))
    points = _points(config, scales)
    return Found(config, metric, scales, points, power_law(*points, config.run.seed), _line(scales), kind)


def _line(scales: list[ScaleFound]) -> Line | None:
    trusted = [(s, s.trusted) for s in scales]
    sizes = [float(parameter_count(s.config.model)) for s, o in trusted if o]
    return learning_rate_line(sizes, [o for _, o in trusted if o])


def _points(config: Config, scales: list[ScaleFound]) -> tuple[np.ndarray, np.ndarray]:
    """The frontier of all trials' curves, each smoothed as its result is."""
    rows = [smoothed(r, config.sweep.tail) for s in scales for r in s.results if len(r.curve)]
    return frontier(*np.concatenate(rows).T) if rows else (np.empty(0), np.empty(0))


def smoothed(result: Result, tail: float) -> np.ndarray:
    """A trial's curve -> (points, 2) of compute and the metric's mean over the last part up to there."""
    steps = [s for s in result.curve[:, 0] if s >= _FIRST * result.trial.config.train.steps]
    if not steps:
        return np.empty((0, 2))
    chosen = np.unique(np.searchsorted(steps, np.geomspace(steps[0], steps[-1], 60)).clip(0, len(steps) - 1))
    taken = [steps[i] for i in chosen]
    return np.array([(step * result.flops_per_step, tail_mean(result.curve, step, tail)) for step in taken])


def held_out(found_: Found) -> dict[str, Any] | None:
    """How well all scales but the largest foretell it; None with fewer than three, or where nothing could be fitted."""
    *others, largest = found_.scales
    if len(others) < 2:
        return None
    rate, loss = largest.expected
    told: dict[str, Any] = {"scale": largest.scale, "lr": rate, "loss": loss}
    line, law = _line(others), power_law(*_points(found_.config, others), found_.config.run.seed)
    if line:
        guess = line.at(parameter_count(largest.config.model))
        told |= {"lr_predicted": guess, "lr_ratio": guess / rate}
    if law:
        expected = float(law.at(largest.compute))
        told |= {"loss_predicted": expected, "loss_error": expected / loss - 1}
    return told if line or law else None


def extrapolated(found_: Found, scale: str) -> dict[str, Any]:
    """The learning rate and loss that the fits expect of a scale that was not run, at the sweep's budget."""
    config = scaled(found_.config, scale)
    count = parameter_count(config.model)
    compute = config.train.steps * float(training_flops(config.model)) * config.train.global_batch
    told: dict[str, Any] = {"scale": scale, "parameters": count, "steps": config.train.steps, "flops": compute}
    if found_.line:
        told |= {"lr": found_.line.at(count), "lr_interval": found_.line.interval(count)}
    if found_.law:
        low, high = found_.law.band(compute)
        told |= {"loss": float(found_.law.at(compute)), "loss_interval": (float(low), float(high))}
    return told


def as_json(found_: Found, verified: Result | None) -> dict[str, Any]:
    """What goes into sweep.json. Infinite values (diverged trials) become null."""
    law, line, config = found_.law, found_.line, found_.config
    rate, loss = found_.winner.expected
    return {
        "metric": found_.metric, "budget": config.sweep.budget, "seed": config.run.seed,
        "winner": {"scale": found_.winner.scale, "lr": rate, "loss_expected": loss,
                   "fitted": found_.winner.trusted is not None, "kind": found_.kind},
        "compare": config.sweep.compare,
        "verified": None if verified is None else {
            "trial": verified.trial.key, "lr": verified.trial.lr, "loss": _finite(verified.value),
            "error": _finite(loss / verified.value - 1),
        },
        "held_out": held_out(found_),
        "predict": [extrapolated(found_, scale) for scale in config.sweep.predict],
        "lr_line": None if line is None else {"offset": line.offset, "slope": line.slope},
        "loss_law": None if law is None else {
            "floor": law.floor, "scale": law.scale, "exponent": law.exponent, "unit_flops": law.unit,
        },
        "frontier": [{"flops": float(c), "loss": float(v)} for c, v in zip(*found_.frontier, strict=True)],
        "lr_octaves": found_.octaves,
        "scales": [_scale_json(s) for s in found_.scales],
        "kinds": [
            {"kind": f.kind, "lr_octaves": f.octaves, "scales": [_scale_json(s) for s in f.scales],
             "lr_line": None if f.line is None else {"offset": f.line.offset, "slope": f.line.slope}}
            for f in found_.every
        ],
    }  # fmt: skip


def _scale_json(scale: ScaleFound) -> dict[str, Any]:
    o, train = scale.optimum, scale.config.train
    return {
        "scale": scale.scale, "parameters": parameter_count(scale.config.model), "steps": train.steps,
        "images": train.steps * train.global_batch, "flops": scale.compute, "workers": train.num_workers,
        "zero_stage": train.zero_stage, "micro_batch": train.micro_batch, "best": scale.best.trial.key,
        "optimum": None if o is None else {
            "lr": o.lr, "loss": o.loss, "curvature": o.curvature, "interval": o.interval, "inside": o.inside,
        },
        "trials": [
            {"trial": r.trial.key, "lr": r.trial.lr, **dict(r.trial.others), "steps": r.steps,
             "value": _finite(r.value), "complete": r.complete}
            for r in sorted(scale.results, key=lambda r: (r.trial.lr, r.trial.key))
        ],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(found_: Found) -> list[str]:
    """Lines for the terminal: a row a scale (and value of sweep.compare), then the winner."""
    rows = [(f"{s.scale} {kind.kind}".strip(), s) for kind in found_.every for s in kind.scales]
    width = max(10, *(len(title) for title, _ in rows))
    lines = [f"{'scale':{width}} {'parameters':>13} {'steps':>8} {'trials':>6}  {'best tried':>10} {'loss':>9}  "
             f"{'optimum':>10} {'loss':>9}"]  # fmt: skip
    for title, s in rows:
        fit = f"{s.optimum.lr:10.3g} {s.optimum.loss:9.4f}" if s.optimum else f"{'none':>10} {'':9}"
        lines.append(
            f"{title:{width}} {parameter_count(s.config.model):13,} {s.config.train.steps:8} {len(s.results):6}  "
            f"{s.best.trial.lr:10.3g} {s.best.value:9.4f}  {fit}{'' if s.trusted or not s.optimum else '  outside'}"
        )
    lines += [f"{k.kind}: the scales' best learning rates lie {k.octaves:.2f} octaves apart" for k in found_.kinds]
    rate, loss = found_.winner.expected
    title = f"{found_.winner.scale} {found_.kind}".strip()
    return [*lines, f"winner: {title} at learning rate {rate:.3g}, expected {found_.metric} {loss:.4f}"]
