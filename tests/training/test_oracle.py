"""The loop and the engine follow a plain single-process run: at every ZeRO stage, on 1, 2 and 4 workers."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from tests.training import oracle

pytestmark = pytest.mark.ray

_Case = tuple[int, dict[str, Any]]  # seed, settings of train
_ROOT = Path(__file__).parents[2]
_STEPS, _LONG, _SMOOTHED = 60, 300, 20
_MUP = {"parametrization": "mup", "base_width": 4}  # half the width: two groups of learning rates

# Largest relative differences from the oracle over 60 steps. Curves: L2 over L2. Weights and EMA: distance from the
# oracle's over the way that the oracle's have come from the initial weights, which hides nothing that stands still.
# fp32: measured 7e-8, 1.1e-7, and of the worst tensor 7e-6 (weights) and 1.3e-5 (EMA).
_FP32 = {"loss": 1e-6, "grad_norm": 1e-6, "weights_worst": 1e-4, "ema_worst": 1e-4}
# bf16, against the oracle in fp32: measured 2.2e-4, 1.4e-3, and over all tensors 9.1e-2 and 7.2e-2, but 2e-2 when the
# same is run again: AdamW makes whole steps of gradients that are nothing but rounding (the timestep embedders').
_BF16 = {"loss": 5e-4, "grad_norm": 3e-3, "weights": 0.3, "ema": 0.3}
# bf16 over 300 steps, losses smoothed over 20: the largest relative difference at any step. Measured: from the oracle
# 3.1e-3 at the most with seed 0 and 7.3e-3 with seed 1, between stages 3.0e-3. Two seeds in fp32 differ by 0.25.
_BF16_CURVE, _SEEDS = 0.02, 0.1


def _case(
    stage: int, micro_batch: int | None = None, precision: str = "fp32", seed: int = 0, steps: int = _STEPS
) -> _Case:
    train = {"zero_stage": stage, "micro_batch": micro_batch, "precision": precision, "steps": steps}
    return seed, train


def _follow(workers: int, cases: list[_Case], folder: Path) -> list[oracle.Run]:
    """Trains each case in one torchrun of so many processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
        "-m", "tests.training.follow_oracle", str(folder), json.dumps(cases),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [_read(folder / f"case-{i}") for i in range(len(cases))]


def _read(folder: Path) -> oracle.Run:
    losses, norms = json.loads((folder / "curves.json").read_text())
    saved = Checkpoint.last(Storage(str(folder)))
    assert saved is not None
    assert saved.step == len(losses)
    return oracle.Run(losses, norms, saved.tensors("weight"), saved.tensors("ema"))


@cache
def _oracle(steps: int = _STEPS, seed: int = 0, mup: bool = False) -> oracle.Run:
    return oracle.train(oracle.settings({"steps": steps, **(_MUP if mup else {})}, seed))


def _errors(found: oracle.Run, expected: oracle.Run, train: dict[str, Any] | None = None) -> dict[str, float]:
    """Relative differences, by the names of the tolerances."""
    errors = {"loss": _relative(found.losses, expected.losses), "grad_norm": _relative(found.norms, expected.norms)}
    start = {name: p.detach() for name, p in oracle.initial_model(oracle.settings(train or {})).named_parameters()}
    for kind, mine, theirs in (("weights", found.weights, expected.weights), ("ema", found.ema, expected.ema)):
        assert mine.keys() == theirs.keys() == start.keys()
        gone = np.array([float((mine[name] - theirs[name]).norm()) for name in start])
        way = np.array([float((theirs[name] - start[name]).norm()) for name in start])
        assert way.min() > 0, "a tensor that never moves shows nothing"
        errors[kind] = float(np.linalg.norm(gone) / np.linalg.norm(way))
        errors[f"{kind}_worst"] = float((gone / way).max())
    return errors


def _relative(found: list[float], expected: list[float]) -> float:
    return float(np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected))


def _check(workers: int, cases: list[_Case], folder: Path) -> None:
    for case, run in zip(cases, _follow(workers, cases, folder), strict=True):
        errors = _errors(run, _oracle(mup="base_width" in case[1]), case[1])
        print(workers, case, {name: f"{error:.1e}" for name, error in errors.items()})
        for name, most in (_FP32 if case[1]["precision"] == "fp32" else _BF16).items():
            assert errors[name] < most, (name, workers, case, errors)


def test_the_oracle_learns_and_meets_every_part_of_the_step() -> None:
    run, config = _oracle(), oracle.settings({})
    assert np.mean(run.losses[-10:]) < 0.5 * np.mean(run.losses[:10])
    assert min(run.norms) < config.train.grad_clip < max(run.norms)
    assert config.train.steps * config.train.global_batch > 2 * sum(oracle.CHUNKS)  # epochs


def test_one_worker_follows_the_oracle_at_every_stage(tmp_path: Path) -> None:
    _check(1, [_case(0, 4), _case(1), _case(2), _case(3, 4)], tmp_path)


def test_two_workers_follow_the_oracle_at_every_stage(tmp_path: Path) -> None:
    _check(2, [_case(0), _case(1, 4), _case(2, 4), _case(3), _case(2, precision="bf16")], tmp_path)


def test_four_workers_follow_the_oracle(tmp_path: Path) -> None:
    _check(4, [_case(1, 2), _case(3)], tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_two_learning_rates_follow_the_oracle_at_every_stage(workers: int, tmp_path: Path) -> None:
    """As muP has them: each is a group of AdamW's, with a flat part of its own at every stage."""
    cases = [_case(stage) for stage in range(4)] + [_case(0, precision="bf16")]
    _check(workers, [(seed, {**train, **_MUP}) for seed, train in cases], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_bf16_stays_near_the_oracle_at_every_stage(workers: int, tmp_path: Path) -> None:
    """At stage 0 with and without accumulation, which is in bf16 there."""
    stages = (1, 3) if workers == 4 else range(4)
    cases = [_case(stage, precision="bf16") for stage in stages]
    _check(workers, [*cases, _case(min(stages), 2, precision="bf16")], tmp_path)


@pytest.mark.slow
def test_bf16_learns_as_fp32_does(tmp_path: Path) -> None:
    """300 steps: far nearer to fp32 with the same seed than fp32 is to itself with another; stages as near."""
    cases = [_case(stage, None, "bf16", seed, _LONG) for stage, seed in ((1, 0), (1, 1), (2, 0), (3, 0))]
    first, other, *stages = (_smoothed(run) for run in _follow(1, cases, tmp_path))
    exact, exact_other = _smoothed(_oracle(_LONG)), _smoothed(_oracle(_LONG, 1))
    assert _apart(exact_other, exact) > _SEEDS
    assert _apart(first, exact) < _BF16_CURVE
    assert _apart(other, exact_other) < _BF16_CURVE
    for stage in stages:
        assert _apart(stage, first) < _BF16_CURVE
        assert _apart(stage, exact) < _BF16_CURVE


def _smoothed(run: oracle.Run) -> np.ndarray:
    return np.convolve(run.losses, np.full(_SMOOTHED, 1 / _SMOOTHED), mode="valid")


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a / b - 1).max())
