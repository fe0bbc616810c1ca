"""Scales: names -> sizes, lengths, workers, memory."""

from __future__ import annotations

from typing import Any

import pytest

from dico_ray.arithmetic import parameter_count, training_flops
from dico_ray.config import Config, ConfigError
from dico_ray.planning.memory import memory_at
from dico_ray.recipes import resolve
from dico_ray.scaling.scales import scaled
from dico_ray.settings import build


def _config(**sections: Any) -> Config:
    return resolve("tiny-cpu", None, sections)


@pytest.mark.parametrize(
    ("scale", "width", "depths"),
    [
        ("x1", 48, (2,) * 5), ("x0.5", 24, (2,) * 5), ("x0.5d2", 24, (4,) * 5), ("x0.01d0.1", 4, (1,) * 5),
        ("w30", 30, (2,) * 5), ("DiCo-S", 128, (5, 4, 4, 4, 4)),
    ],
)  # fmt: skip
def test_names_of_scales(scale: str, width: int, depths: tuple[int, ...]) -> None:
    architecture = scaled(_config(), scale).model.architecture
    assert (architecture.hidden_size, architecture.depths) == (width, depths)


@pytest.mark.parametrize("scale", ["huge", "x", "w", "x0.5d", "DiCo-Q", "w3.5"])
def test_other_names_are_refused(scale: str) -> None:
    with pytest.raises(ConfigError, match=rf"sweep\.scales: '{scale}' is no scale"):
        build({"sweep": {"scales": [scale]}})


def test_an_odd_width_is_the_models_own_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 31 is odd"):
        scaled(_config(), "w31")


def test_budgets_are_equal_images_or_equal_arithmetic() -> None:
    images = [scaled(_config(), s).train.steps for s in ("x0.5", "x1", "x1.5")]
    assert images == [1200] * 3
    config = _config(sweep={"budget": "flops"})
    work = [s.train.steps * training_flops(s.model) for s in (scaled(config, n) for n in ("x0.5", "x1", "x1.5"))]
    assert work == pytest.approx([1200 * training_flops(config.model)] * 3, rel=1e-3)


def test_larger_scales_get_more_workers() -> None:
    config = _config(train={"num_workers": [1, 8]}, sweep={"worker_parameters": 1e6})
    workers = {name: scaled(config, name).train.num_workers for name in ("w16", "x1", "x1.5", "DiCo-S")}
    counts = {name: parameter_count(scaled(config, name).model) for name in workers}
    assert workers == {"w16": 1, "x1": 3, "x1.5": 8, "DiCo-S": 8}  # of 1, 2, 3, 4, 6, 8, among which 96 divides
    assert counts["x1"] < 3e6
    assert scaled(_config(train={"num_workers": [2, 8]}), "DiCo-S").train.num_workers == 2


def test_stage_and_micro_batch_follow_from_memory() -> None:
    base = {"train": {"num_workers": [1, 8], "zero_stage": 1, "precision": "bf16", "global_batch": 1024}}
    h = resolve("dico-h-256", None, {**base, "sweep": {"worker_parameters": 1.3e8, "worker_memory_gb": 75}})
    roomy = scaled(h, "DiCo-H")
    assert (roomy.train.num_workers, roomy.train.zero_stage) == (8, 1)
    assert memory_at(roomy, 1, 8, roomy.train.micro_batch or 0) <= 75e9
    tight = scaled(build({**h.model_dump(), "sweep": {**h.sweep.model_dump(), "worker_memory_gb": 6}}), "DiCo-H")
    assert tight.train.zero_stage == 3 or (tight.train.micro_batch or 0) < (roomy.train.micro_batch or 0)
    assert 128 % (tight.train.micro_batch or 0) == 0
    with pytest.raises(ConfigError, match=r"sweep\.scales: DiCo-H cannot fit: \d+\.\d+ GB a worker at ZeRO 3"):
        scaled(build({**h.model_dump(), "sweep": {**h.sweep.model_dump(), "worker_memory_gb": 1}}), "DiCo-H")
