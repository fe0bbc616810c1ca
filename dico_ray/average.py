"""`dico-ray ema`: snapshots of a run's averages -> the average of any other width, as a checkpoint to sample from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dico_ray.config import WIDEST_PROFILE, Config, ConfigError, is_profile_name
from dico_ray.progress import Progress
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training import posthoc
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.ema import CONSTANT

_POOR = 0.05  # relative error of a profile from which on advice is given
_NOTHING = 1e-9  # a smaller factor does not show in fp32: its snapshot is not read


class Snapshot(NamedTuple):
    """One of a run's averages at one step."""

    checkpoint: Checkpoint
    kind: str
    sigma_rel: float


def main(config: Config, *, sigma: float, step: int = 0, verbose: bool = False) -> None:
    """Writes RUN/ema-SIGMA/step-STEP: kind "ema" is the average of relative width `sigma` after `step` steps.

    step 0: the last snapshot's. Raises ConfigError for a width or step that cannot be had, or without snapshots.
    """
    _check_sigma(sigma)
    run = Storage(config.run.folder)
    snapshots = find(run)
    step = step or snapshots[-1].checkpoint.step
    last = snapshots[-1].checkpoint
    if not 1 <= step <= last.step:
        raise ConfigError(f"--step {step}: the snapshots of {run.url} end at step {last.step}; take 1 to {last.step}")
    known = [(s.checkpoint.step, s.sigma_rel) for s in snapshots]
    factors = posthoc.weights(known, step, sigma)
    error = posthoc.error(known, factors, step, sigma)
    terms = [(s, f) for s, f in zip(snapshots, factors.tolist(), strict=True) if abs(f) > _NOTHING]
    about = {
        **last.about,
        "posthoc": {
            "sigma_rel": sigma, "error": error,
            "snapshots": [[s.checkpoint.step, s.kind, factor] for s, factor in terms],
        },
    }  # fmt: skip
    averages = {CONSTANT: reconstruct(terms)}
    written = checkpoints.write_whole(run.at(posthoc.kind(sigma)), step, averages, about)
    print(f"ema: {written.storage.url}")
    hint = "" if error < _POOR else "; snapshots taken more often, or the step of one, make it smaller"
    print(f"ema: relative error of its profile {error:.1e}, from {len(terms)} of {len(snapshots)} averages{hint}")


def _check_sigma(sigma: float) -> None:
    if not 0 < sigma < WIDEST_PROFILE:
        raise ConfigError(f"--sigma {sigma:g}: a relative width lies between 0 and {WIDEST_PROFILE}, such as 0.075")
    if not is_profile_name(sigma):
        raise ConfigError(f"--sigma {sigma}: has more than three decimals; round it")


def find(run: Storage) -> list[Snapshot]:
    """The committed snapshots of a run, by step and width. Raises ConfigError if there are none."""
    found = [
        Snapshot(checkpoint, kind, posthoc.sigma_of(kind))
        for checkpoint in Checkpoint.all(run.at(checkpoints.AVERAGES))
        for kind in checkpoint.kinds
    ]
    if not found:
        raise ConfigError(
            f"run.name: {run.url} has no snapshots of averages; train with train.ema_profiles and "
            "train.ema_snapshot_every, or name another run"
        )
    return found


def reconstruct(terms: list[tuple[Snapshot, float]]) -> dict[str, Tensor]:
    """Sum of factor times average -> every parameter, fp32, in its shape.

    Summed in float64, a parameter at a time: memory is the result's and two parameters' more.
    """
    shapes: dict[str, list[int]] = terms[-1][0].checkpoint.commit["shapes"]
    for snapshot, _ in terms:
        snapshot.checkpoint.check_fits({name: tuple(shape) for name, shape in shapes.items()})
    result: dict[str, Tensor] = {}
    with Progress("ema", len(shapes), "tensors") as progress:
        for done, (name, shape) in enumerate(shapes.items(), 1):
            total = torch.zeros(torch.Size(shape).numel(), dtype=torch.float64)
            for snapshot, factor in terms:
                total.add_(snapshot.checkpoint.read(snapshot.kind, name, 0, len(total)), alpha=factor)
            result[name] = total.float().reshape(shape)
            progress.update(done)
    return result
