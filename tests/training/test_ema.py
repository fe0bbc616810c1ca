"""The averages against float64 sums over the weights' own trajectory, at every stage, through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dico_ray.config import ConfigError
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training import posthoc
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from tests.training.saving import save, save_averages

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_process")]

STEPS, DECAY, PROFILES = 12, 0.9, (0.05, 0.1, 0.25)


def make(stage: int, precision: str, profiles: tuple[float, ...] = PROFILES) -> tuple[Engine, EMA]:
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
    settings = {"global_batch": 4, "precision": precision, "zero_stage": stage, "lr": 1e-3}
    engine = Engine(model, build({"train": settings}).train, torch.device("cpu"))
    return engine, EMA(engine, DECAY, profiles)


def take_step(engine: Engine, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    inputs, wanted = torch.randn(4, 4, 8, 8, generator=rng), torch.randn(4, 8, 8, 8, generator=rng)
    dtype = next(engine._deepspeed.module.parameters()).dtype
    output = engine(inputs.to(dtype), torch.arange(4), torch.arange(4))
    engine.backward((output.float() - wanted).square().mean())


def by_name(engine: Engine, tensors: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Whole flattened parameters of one process's fragments, in float64."""
    owned = [f for f in engine.fragments() if f.owned]
    return {f.name: t.double().numpy().copy() for f, t in zip(owned, tensors, strict=True)}


def flat(values: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([values[name] for name in sorted(values)])


def masters(engine: Engine) -> np.ndarray:
    return flat(by_name(engine, [f.weight for f in engine.fragments() if f.owned]))


def run(
    stage: int, precision: str, after: Callable[[int, Engine, EMA], tuple[Engine, EMA]] | None = None
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The masters before the first and after every step (float64), and the averages at the end, by kind."""
    engine, ema = make(stage, precision)
    seen = [masters(engine)]
    for step in range(1, STEPS + 1):
        take_step(engine, step)
        ema.update(step)
        seen.append(masters(engine))
        if after:
            engine, ema = after(step, engine, ema)
    averages = {kind: flat(by_name(engine, ema.tensors(kind))) for kind in ema.kinds()}
    engine.close()
    return seen, averages


def expected(seen: list[np.ndarray], kind: str) -> np.ndarray:
    """The average as one weighted sum over the trajectory."""
    if kind == "ema":
        shares = [DECAY**STEPS, *((1 - DECAY) * DECAY ** (STEPS - i) for i in range(1, STEPS + 1))]
    else:
        edges = (np.arange(STEPS + 1) / STEPS) ** (posthoc.gamma_of(posthoc.sigma_of(kind)) + 1)
        shares = [0.0, *np.diff(edges)]
    return sum((share * weights for share, weights in zip(shares, seen, strict=True)), np.zeros_like(seen[0]))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_averages_are_the_profiles_sums_over_the_trajectory(stage: int, precision: str) -> None:
    """In fp32 whatever the network's arithmetic: 1e-6, where a bf16 average would be off by 1e-3."""
    seen, averages = run(stage, precision)
    assert list(averages) == ["ema", "ema-0.050", "ema-0.100", "ema-0.250"]
    for kind, found in averages.items():
        assert distance(found, expected(seen, kind)) < 1e-6, kind
        assert distance(found, seen[-1]) > 1e-4, kind


def test_stages_keep_the_same_averages() -> None:
    _, reference = run(0, "fp32")
    for stage in (1, 2, 3):
        _, averages = run(stage, "fp32")
        for kind, wanted in reference.items():
            assert distance(averages[kind], wanted) < 1e-5, (stage, kind)


def test_a_checkpoint_carries_every_average_to_another_stage(tmp_path: Path) -> None:
    def move(step: int, engine: Engine, ema: EMA) -> tuple[Engine, EMA]:
        if step != STEPS // 2:
            return engine, ema
        save(Storage(str(tmp_path)), step, engine, ema, {})
        engine.close()
        engine, ema = make(3, "fp32")
        saved = Checkpoint.last(Storage(str(tmp_path)))
        assert saved is not None
        assert saved.kinds == ["ema", "ema-0.050", "ema-0.100", "ema-0.250", "exp_avg", "exp_avg_sq", "weight"]
        checkpoints.restore(saved, engine, ema)
        return engine, ema

    _, straight = run(1, "fp32")
    _, moved = run(1, "fp32", move)
    for kind, wanted in straight.items():
        assert distance(moved[kind], wanted) < 1e-5, kind


def test_a_profile_added_later_is_refused_and_one_left_out_is_not(tmp_path: Path) -> None:
    engine, ema = make(1, "fp32", (0.05,))
    save(Storage(str(tmp_path)), 1, engine, ema, {})
    saved = Checkpoint.last(Storage(str(tmp_path)))
    assert saved is not None
    with pytest.raises(ConfigError, match=r"train\.ema_profiles: .* has no average ema-0\.100"):
        checkpoints.restore(saved, engine, EMA(engine, DECAY, (0.05, 0.1)))
    checkpoints.restore(saved, engine, EMA(engine, DECAY))
    engine.close()


def test_snapshots_hold_the_profiles_alone_and_those_beyond_a_step_go(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    engine, ema = make(1, "fp32")
    for step in (1, 2, 3):
        save_averages(storage, step, engine, ema, {"made": "here"})
    engine.close()
    assert [(c.step, c.kinds, c.about) for c in Checkpoint.all(storage)] == [
        (step, ["ema-0.050", "ema-0.100", "ema-0.250"], {"made": "here"}) for step in (1, 2, 3)
    ]
    checkpoints.drop_after(storage, 1)
    assert [f.step for f in checkpoints.find(storage)] == [1]
