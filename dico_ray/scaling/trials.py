"""The trials of a sweep: what each one trains, under which name, how far, and which go on or are added."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dico_ray.config import Config, ConfigError
from dico_ray.scaling.scales import scaled
from dico_ray.settings import SECTION_NAMES, build, fields, merge, nearest

_DECIDED = ("run.", "storage.", "resources.", "sweep.", "encode.", "sample.", "evaluate.", "train.lr", "train.steps",
            "train.num_workers", "train.global_batch", "model.kernels")  # fmt: skip
# What makes two runs different. Their length, workers, memory, logging are not among it: a trial keeps its run.
_TRAIN = ("global_batch", "lr", "warmup_steps", "betas", "weight_decay", "grad_clip", "label_drop", "flip",
          "ema_decay", "precision")  # fmt: skip
_MUP = ("parametrization", "base_width")  # where it is used: without it, names stay those of before there was a choice


@dataclass(frozen=True)
class Trial:
    """One learning rate (and other settings) at one scale. config: what `train` gets, at its full length."""

    scale: str
    lr: float
    others: tuple[tuple[str, Any], ...]
    config: Config = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        return self.config.run.name

    def to(self, steps: int) -> Config:
        """What takes the trial to so many steps; from its checkpoint, if it has been on its way."""
        return build(merge(self.config.model_dump(), {"train": {"steps": steps}}))


def make(config: Config, scale: str, settings: dict[str, Any]) -> Trial:
    """settings: values by dotted name, train.lr among them. Raises ConfigError for a value that cannot be."""
    base = scaled(config, scale).model_dump()
    for path, value in settings.items():
        section, _, name = path.partition(".")
        base = merge(base, {section: {name: value}})
    folder = f"{config.run.folder}/trials"
    built = build(merge(base, {"run": {"storage": folder}, "sweep": {"scales": [scale]}}))
    lr = float(settings["train.lr"])
    named = build(merge(built.model_dump(), {"run": {"name": f"{scale}-lr{lr:.3g}-{_digest(built)}".replace("+", "")}}))
    others = tuple(sorted((path, value) for path, value in settings.items() if path != "train.lr"))
    return Trial(scale, lr, others, named)


def _digest(config: Config) -> str:
    dumped = config.model_dump(mode="json")
    train = {name: dumped["train"][name] for name in (*_TRAIN, *(_MUP if config.train.mup_width else ()))}
    model = dumped["model"] | {"kernels": "torch"}  # which path computes them does not make another trial
    whole = [train, model, dumped["data"]["latents"], dumped["data"]["window_samples"], dumped["run"]["seed"]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]


def _told_by_name(path: str) -> bool:
    """Whether trials that differ in this setting have different names, and so folders of their own."""
    section, _, name = path.partition(".")
    return (
        section == "model"
        or path in ("data.latents", "data.window_samples")
        or (section == "train" and name in (*_TRAIN, *_MUP))
    )


def check_space(config: Config) -> None:
    """Raises ConfigError, one line, for a key that is no setting, values that cannot be, or none."""
    known = {setting.path for section in SECTION_NAMES for setting in fields(section)}
    for path, values in config.sweep.space.items():
        if path not in known:
            raise ConfigError(f"sweep.space: {path} is not a setting{nearest(path)}")
        if path == "train.lr":
            raise ConfigError("sweep.space: train.lr is swept by sweep.lr; set [low,high] there")
        if path.startswith(_DECIDED) or not _told_by_name(path):
            raise ConfigError(
                f"sweep.space: {path} cannot be varied: the sweep decides it, or training does not use it"
            )
        if isinstance(values, dict):
            _check_range(config, path, values)
        elif not isinstance(values, list) or not values:
            raise ConfigError(f"sweep.space: {path}: {values!r} is empty or no list; give its values as [1, 2]")
    for scale in config.sweep.scales:
        for settings in _combinations(config):
            trial = make(config, scale, {"train.lr": config.sweep.lr[0], **settings})
            if rung_steps(trial.config)[0] <= trial.config.train.warmup_steps:
                raise ConfigError(
                    f"sweep.rungs: the first stage of {scale} ends at step {rung_steps(trial.config)[0]}, within "
                    f"train.warmup_steps = {trial.config.train.warmup_steps}; lower sweep.rungs or train.warmup_steps"
                )


def _check_range(config: Config, path: str, values: dict[str, Any]) -> None:
    if config.sweep.search == "grid":
        raise ConfigError(f"sweep.space: {path}: a grid needs a list of values; take sweep.search random or optuna")
    ends = [v for v in (values.get("low"), values.get("high")) if isinstance(v, int | float)]
    known = set(values) <= {"low", "high", "log"}
    if not known or len(ends) < 2 or ends[0] >= ends[1] or (values.get("log") and ends[0] <= 0):
        raise ConfigError(f"sweep.space: {path}: {values} is no range; give {{low: 0.01, high: 0.1, log: true}}")


def _combinations(config: Config) -> list[dict[str, Any]]:
    """Of the other settings' values (the ends of ranges)."""
    axes = [
        [(path, v) for v in ([values["low"], values["high"]] if isinstance(values, dict) else values)]
        for path, values in config.sweep.space.items()
    ]
    return [dict(choice) for choice in itertools.product(*axes)]


def planned(config: Config, scale: str) -> list[Trial]:
    """The trials of a scale that a grid or random search begins with: a function of the settings and run.seed."""
    low, high = config.sweep.lr
    if config.sweep.search == "grid":
        rates = [rounded(rate) for rate in np.geomspace(low, high, config.sweep.points)]
        return [make(config, scale, {"train.lr": rate, **more}) for more in _combinations(config) for rate in rates]
    found = []
    for kind in config.sweep.space.get(config.sweep.compare, [None]):
        rng = np.random.default_rng([config.run.seed, *scale.encode()])  # the same draws for all that are compared
        for _ in range(config.sweep.points):
            more = {path: _draw(rng, values) for path, values in config.sweep.space.items()}
            settings = {"train.lr": rounded(_between(rng, low, high, True)), **more}
            found.append(make(config, scale, settings | ({config.sweep.compare: kind} if config.sweep.compare else {})))
    return found


def by_kind(config: Config, trials: list[Trial]) -> list[list[Trial]]:
    """Trials by the value of sweep.compare, in its order; all together without it."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(kind_of(config, trial), []).append(trial)
    return list(groups.values())


def title(config: Config, trial: Trial) -> str:
    """Its scale, and what it is compared by."""
    kind = kind_of(config, trial)
    return f"{trial.scale} {kind}" if kind else trial.scale


def kind_of(config: Config, trial: Trial) -> str:
    """The value of sweep.compare that a trial has, as it is shown; empty without sweep.compare."""
    return str(dict(trial.others)[config.sweep.compare]) if config.sweep.compare else ""


def _draw(rng: np.random.Generator, values: Any) -> Any:
    if isinstance(values, dict):
        return rounded(_between(rng, values["low"], values["high"], values.get("log", False)))
    return values[int(rng.integers(len(values)))]


def _between(rng: np.random.Generator, low: float, high: float, log: bool) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)


def rounded(value: float) -> float:
    """Four digits: the same number when it is read back from a file's name or a table."""
    return float(f"{value:.4g}")


def rung_steps(config: Config) -> list[int]:
    """Steps at which each stage of successive halving ends, the last one the trial's full length."""
    sweep, steps = config.sweep, config.train.steps
    return [max(1, math.ceil(steps / sweep.eta ** (sweep.rungs - 1 - rung))) for rung in range(sweep.rungs)]


def survivors(trials: list[Trial], values: dict[str, float], eta: float) -> list[Trial]:
    """The trials of one scale that go on: the best 1/eta by value, at least three (a parabola needs three).

    Trials are compared with those of their own scale at the same images and arithmetic, so none is stopped for
    being small. values: by key; a trial that diverged has infinity.
    """
    alive = sorted((t for t in trials if math.isfinite(values[t.key])), key=lambda t: (values[t.key], t.key))
    return alive[: max(3, math.ceil(len(trials) / eta))]


def widened(config: Config, trials: list[Trial], values: dict[str, float]) -> Trial | None:
    """The trial beyond the range that one scale's results ask for; None if its best one lies strictly inside.

    trials: all of the scale; values: by key, those trained to the end. The new rate is a grid's step further.
    """
    finished = [t for t in trials if math.isfinite(values.get(t.key, math.inf))]
    if not finished:
        return None
    best = min(finished, key=lambda t: values[t.key])
    rates = sorted({t.lr for t in trials})
    step = (config.sweep.lr[1] / config.sweep.lr[0]) ** (1 / (config.sweep.points - 1))
    if best.lr in (rates[0], rates[-1]):
        rate = rounded(best.lr * step if best.lr == rates[-1] else best.lr / step)
        return make(config, best.scale, {"train.lr": rate, **dict(best.others)})
    return None
