"""Exponential moving average of the weights, in fp32, on the fragments that a rank owns.

A step of 1e-4 rounds away in bf16, and a deep copy of a model does not survive ZeRO-3: so the average follows
the fp32 master weights where they lie, and looks the same at every stage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dico_ray.training.engine import Engine


class EMA:
    """ema <- decay * ema + (1 - decay) * weight, after each optimizer step; starts from the initial weights."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """decay: in [0, 1)."""
        self.decay = decay
        self._fragments = [f for f in engine.fragments() if f.owned]
        self._weights = [f.weight for f in self._fragments]
        self._averages = [w.clone() for w in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self._averages, self._weights, 1 - self.decay
        )

    def restore(self, read: Callable[[str, str, int, int], Tensor]) -> None:
        """read(kind, name, start, stop) gives fp32 elements of a flattened parameter's average."""
        for fragment, average in zip(self._fragments, self._averages, strict=True):
            average.copy_(read("ema", fragment.name, fragment.start, fragment.stop))

    def kinds(self) -> list[str]:
        return ["ema"]

    def tensors(self, kind: str = "ema") -> list[Tensor]:
        """The averages, in the order of the engine's owned fragments; live, they change with every update."""
        return self._averages
