"""The loop without Ray, on one process: accumulation, warm-up, divergence, and what it draws."""

from __future__ import annotations

import pickle
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dico_ray.config import Config
from dico_ray.data.shards import LatentBatch
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.loop import DivergedError, learning_rate, train_loop

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_process")]


class Recorded:
    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at
        self.metrics: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.snapshots: list[int] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        self.saved.append(step)

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        assert step not in self.saved  # a run that resumes at a checkpoint has its snapshot
        self.snapshots.append(step)

    def stepped(self, step: int) -> bool:
        return step == self.stop_at


def _config(**settings: Any) -> Config:
    return build({
        "model": {"hidden_size": 8, "depths": [1] * 5, "num_classes": 10, "latent_size": 8},
        "train": {"global_batch": 8, "steps": 6, "precision": "fp32", "log_every": 1, "ema_decay": 0.9,
                  "lr": 1e-3, "checkpoint_every": 4, **settings},
    })  # fmt: skip


def _batches(steps: int, nan_at: Container[int] = ()) -> Iterator[LatentBatch]:
    rng = np.random.default_rng(1)
    for step in range(steps):
        latents = rng.standard_normal((8, 4, 8, 8)).astype(np.float16)
        if step in nan_at:
            latents[3, 0, 0, 0] = np.nan
        yield LatentBatch(step, np.arange(8), latents, rng.integers(0, 10, 8), np.arange(8))


def _run(
    config: Config, batches: Iterator[LatentBatch], passed_over: Container[int] = (), stop_at: int = -1
) -> tuple[Recorded, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
    engine = Engine(model, config.train, torch.device("cpu"))
    ema, report = EMA(engine, config.train.ema_decay, config.train.ema_profiles), Recorded(stop_at)
    train_loop(config, engine, ema, batches, report, passed_over)
    average = torch.cat([t.clone() for t in ema.tensors()])
    engine.close()
    return report, average


def test_accumulated_steps_equal_undivided_ones() -> None:
    whole, average = _run(_config(), _batches(6))
    parts, accumulated = _run(_config(micro_batch=2), _batches(6))
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert float((average - accumulated).norm() / average.norm()) < 1e-4


def test_it_logs_and_saves_when_told_and_stops_at_the_last_step() -> None:
    report, _ = _run(_config(log_every=4), _batches(50))
    assert [m["step"] for m in report.metrics] == [4, 6]
    assert (report.saved, report.snapshots) == ([4, 6], [])
    assert {"loss", "mse", "vb", "grad_norm", "lr", "images_per_s", "data_wait"} <= report.metrics[0].keys()


def test_averages_are_kept_when_told_and_at_the_last_step() -> None:
    report, _ = _run(_config(ema_profiles=[0.1], ema_snapshot_every=2, steps=5), _batches(5))
    assert (report.snapshots, report.saved) == ([2, 4, 5], [4, 5])


def test_a_logged_loss_is_the_mean_since_the_last_one() -> None:
    each, _ = _run(_config(), _batches(6))
    pairs, _ = _run(_config(log_every=2), _batches(6))
    losses = [m["loss"] for m in each.metrics]
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [m["loss"] for m in pairs.metrics] == pytest.approx(means, rel=1e-5)


def test_other_seeds_draw_other_noise() -> None:
    one, _ = _run(_config(), _batches(1))
    other, _ = _run(build({**_config().model_dump(), "run": {"seed": 9}}), _batches(1))
    assert abs(one.metrics[0]["loss"] - other.metrics[0]["loss"]) > 1e-4


def test_clipping_bounds_the_step_and_the_logged_norm_is_from_before() -> None:
    free, _ = _run(_config(steps=1), _batches(1))
    clipped, _ = _run(_config(steps=1, grad_clip=1e-3), _batches(1))
    assert clipped.metrics[0]["grad_norm"] == pytest.approx(free.metrics[0]["grad_norm"], rel=1e-4)
    assert free.metrics[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_without_finite_gradients_is_left_out_and_counted(stage: int, precision: str, offload: bool) -> None:
    """The weights after it are those of a run that never saw it, at every stage (its EMA moves on, unlike theirs)."""
    if offload and not stage:
        offload = False  # the same case once more
    config = _config(zero_stage=stage, precision=precision, offload=offload, micro_batch=4, ema_decay=0.0)
    report, weights = _run(config, _batches(6, nan_at=[2]))
    assert [m["step"] for m in report.metrics] == [1, 2, 4, 5, 6]  # the third has nothing to tell
    assert report.metrics[-1]["skipped_steps"] == 1
    assert all(np.isfinite(m["loss"]) for m in report.metrics)
    _, without = _run(config, _batches(6), passed_over=[2])
    assert torch.equal(weights, without)


def test_bad_steps_in_a_row_end_the_run_and_name_the_sample() -> None:
    with pytest.raises(
        DivergedError, match=r"steps 2 to 4 were not finite .*samples 3 of the data set.*train\.lr"
    ) as told:
        _run(_config(steps=20, max_skipped_steps=3), _batches(20, nan_at=range(2, 20)))
    assert told.value.steps == (2, 3, 4)
    assert pickle.loads(pickle.dumps(told.value)).steps == (2, 3, 4)  # noqa: S301 - as Ray carries it


def test_no_checkpoint_is_made_among_bad_steps() -> None:
    report, _ = _run(_config(steps=12), _batches(12, nan_at=[3]))
    assert report.saved == [8, 12]  # and none after step 4


def test_it_stops_with_a_checkpoint_when_asked() -> None:
    report, _ = _run(_config(steps=20, log_every=10), _batches(20), stop_at=3)
    assert report.saved == [3]


def test_the_time_of_a_step_is_split() -> None:
    report, _ = _run(_config(micro_batch=4), _batches(6))
    for m in report.metrics[1:]:
        parts = sum(m[f"{name}_s"] for name in ("draw", "forward", "backward", "optimizer", "ema"))
        assert 0.7 * m["step_s"] < parts <= 1.01 * m["step_s"] + 1e-3
        assert m["tflops_per_worker"] > 0


def test_the_warm_up_is_linear_and_ends_at_lr() -> None:
    config = _config(warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(_config(), 0) == 1e-3
