"""A run's evaluations beside training: which checkpoints wait for one, and what was found.

    evaluations/due/CHECKPOINT        waits, and is not removed meanwhile (the name of its folder in checkpoints/)
                step-00010000.json    the result, with all that it rests on
                step-00010000.png     its first images, of the same noise and labels at every step

Files, not messages: what waits is still known when the command or its cluster is gone.
"""

from __future__ import annotations

import json
from typing import Any

from dico_ray.config import Config
from dico_ray.storage import Storage
from dico_ray.training.telemetry import EVALUATED

FOLDER = "evaluations"
_DUE = "due"
_COUNTS = ("step", "images", "reference_images")  # numbers of a result that judge nothing


class Evaluations:
    """Of one run. Rank 0 says what is committed, the driver what has become of it."""

    def __init__(self, run: Storage, every: int, last: int) -> None:
        """every: steps between them. last: the run's last step, which has one too."""
        self._storage, self._every, self._last = run.at(FOLDER), every, last

    @classmethod
    def of(cls, config: Config) -> Evaluations | None:
        """None if the settings want none."""
        every = config.evaluate.every
        return cls(Storage(config.run.folder), every, config.train.steps) if every else None

    def committed(self, checkpoint: str, step: int) -> None:
        """A checkpoint is complete: if its step is one of ours it is due."""
        if step % self._every == 0 or step == self._last:
            self._storage.write(f"{_DUE}/{checkpoint}", f"{step}\n".encode())

    def due(self) -> list[str]:
        """Checkpoints that wait, oldest first."""
        return self._storage.at(_DUE).names()

    def settle(self, checkpoint: str) -> None:
        """It waits no more."""
        self._storage.remove(f"{_DUE}/{checkpoint}")

    def keep(self, checkpoint: str, step: int, result: dict[str, Any] | None, grid: bytes) -> None:
        """Writes what was found. result: None where there was no reference to judge by. grid: a PNG."""
        name = f"step-{step:08d}"
        found = {"checkpoint": checkpoint, "step": step, "scores": scores_of(result or {}), "result": result}
        self._storage.write(f"{name}.png", grid)
        self._storage.write(f"{name}.json", json.dumps(found, indent=1).encode())

    def scores(self, metric: str) -> dict[str, float]:
        """A metric of all checkpoints that have it, by the checkpoint's name."""
        return scores(self._storage, metric)


def results(storage: Storage) -> list[dict[str, Any]]:
    """What was found, by step. storage: the folder evaluations/ of a run."""
    names = [name for name in storage.names(".json") if "/" not in name]
    return [json.loads(storage.read(name)) for name in sorted(names)]


def scores(storage: Storage, metric: str) -> dict[str, float]:
    """A metric of all checkpoints that have it, by the checkpoint's name. storage: as above."""
    return {f["checkpoint"]: f["scores"][metric] for f in results(storage) if f["scores"].get(metric) is not None}


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation's result that are logged: its scores, how many images they rest on."""
    numbers = {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _COUNTS
    }
    rate = (result.get("judge") or {}).get("images")
    return {
        **numbers,
        **({"judge_rate": rate} if rate is not None else {}),
        **({EVALUATED: result["images"]} if "images" in result else {}),
    }
