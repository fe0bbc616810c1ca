"""Sweeps: which learning rates, at which scales, for how much compute."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dico_ray.config.base import Section
from dico_ray.config.model import ARCHITECTURES

LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SCALE = re.compile(r"w(?P<width>\d+)|x(?P<times>\d+(?:\.\d+)?)(?:d(?P<deeper>\d+(?:\.\d+)?))?")
"""A scale that is no row of the family: a width of the first stage (w32), or the configured model's width and depths
times something (x0.5, x0.5d2)."""


def _texts(values: Any) -> Any:
    return [str(value) for value in values] if isinstance(values, list | tuple) else values


class Sweep(Section):
    """learning rate x scale -> the best run, and how loss and learning rate scale."""

    scales: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ("x1",)
    "Scales: rows of the family (DiCo-B), widths (w32), or multiples of model's width and depths (x0.5, x0.5d2)."
    lr: tuple[LearningRate, LearningRate] = (2.5e-5, 4e-4)
    "Least and largest learning rate, as [low,high]; widened where the best one lies at an end."
    points: int = Field(5, ge=3)
    "Learning rates of each scale: spaced evenly in the logarithm (grid), drawn (random), or searched (optuna)."
    space: dict[str, Any] = Field({})
    "Other settings to vary, as {train.weight_decay: [0, 0.1]}; also {low: 0, high: 0.1, log: false} if not a grid."
    compare: str = ""
    "One of space's settings: each of its values is swept for itself, with optima and a law of its own in the report."
    search: Literal["grid", "random", "optuna"] = "grid"
    "How points are chosen; optuna needs the extra `sweep`."
    budget: Literal["images", "flops"] = "images"
    "What every trial gets alike: the images of train.steps, or the arithmetic that model takes for train.steps."
    rungs: int = Field(1, ge=1)
    "Successive halving in so many stages; trials are compared within their scale alone. 1: all are trained to the end."
    eta: float = Field(2.0, gt=1)
    "The best 1/eta of a scale's trials (at least three) go on to the next stage, eta times as far, from checkpoints."
    metric: str = ""
    "Logged number to minimise. Unset: val_loss if train.validate_every is set, otherwise loss."
    tail: float = Field(0.1, gt=0, le=1)
    "A trial's result is the metric's mean over this last part of its steps."
    widen: int = Field(3, ge=0)
    "Times that a scale's range may be widened because its best learning rate lies at an end."
    worker_parameters: float | None = Field(None, gt=0)
    "A scale gets a worker for each so many parameters, as the global batch divides. Unset: train.num_workers (least)."
    worker_memory_gb: float | None = Field(None, gt=0)
    "A worker's memory: ZeRO stage and micro-batch of each scale follow from it. Unset: train.zero_stage, micro_batch."
    max_failures: int = Field(2, ge=0)
    "Deaths of a trial's process after which it is given up; each restart continues at its checkpoint."
    predict: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()
    "Scales that are not run: their learning rate and loss are extrapolated."
    verify: bool = True
    "Train the winner at its fitted learning rate, and compare with the loss that the fit expects."

    @model_validator(mode="after")
    def _possible(self) -> Sweep:
        if not self.scales:
            raise ValueError("sweep.scales: [] is empty; name at least one scale, such as DiCo-S or x1")
        for name, scales in (("scales", self.scales), ("predict", self.predict)):
            for scale in scales:
                if scale not in ARCHITECTURES and not SCALE.fullmatch(scale):
                    rows = ", ".join(ARCHITECTURES)
                    raise ValueError(
                        f"sweep.{name}: {scale!r} is no scale; take {rows}, a width (w32), or x0.5, x0.5d2"
                    )
                if scales.count(scale) > 1:
                    raise ValueError(f"sweep.{name}: {scale} stands there twice; name each scale once")
        if self.lr[0] >= self.lr[1]:
            raise ValueError(f"sweep.lr: {list(self.lr)} holds no range; give [low,high] with low < high")
        if self.search == "optuna" and self.rungs > 1:
            raise ValueError(
                f"sweep.rungs: {self.rungs} cannot go with sweep.search optuna, which learns from finished trials; "
                "take rungs 1, or search grid or random"
            )
        self._comparison()
        return self

    def _comparison(self) -> None:
        values = self.space.get(self.compare)
        if self.compare and (not isinstance(values, list) or len(values) < 2):
            raise ValueError(
                f"sweep.compare: {self.compare} needs two values or more in sweep.space, such as "
                f"{{{self.compare}: [...]}}"
            )
        if self.compare and self.search == "optuna":
            raise ValueError(
                f"sweep.compare: {self.compare} cannot go with sweep.search optuna, which would choose among its "
                "values; take grid or random"
            )
