"""Moving averages of the weights, in fp32, on the fragments that a rank owns; any number at once.

A step of 1e-4 rounds away in bf16, and a deep copy of a model does not survive ZeRO-3: so the averages follow
the fp32 master weights where they lie, and look the same at every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dico_ray.training import posthoc
from dico_ray.training.engine import Engine

CONSTANT = "ema"
_NOTICED = 0.05  # of an average: with more of the initial weights in it, it is markedly worse than the network


def initial_share(decay: float, step: int) -> float:
    """How much of the average of a constant decay the initial weights still are after so many steps; 0 if little."""
    share = decay**step
    return share if share > _NOTICED else 0.0


class EMA:
    """average <- beta * average + (1 - beta) * weight, after each optimizer step.

    Kind "ema" has one beta for all steps and starts from the initial weights. Kinds "ema-0.050" (a profile's
    relative width sigma_rel) have EDM2's beta_gamma(step), which forgets the initial weights in the first step
    (arXiv 2312.02696). Each takes 4 bytes a parameter, over all ranks.
    """

    def __init__(self, engine: Engine, decay: float, profiles: Sequence[float] = ()) -> None:
        """decay: in [0, 1). profiles: relative widths in (0, 0.28), distinct in three decimals."""
        self.decay = decay
        self._fragments = [f for f in engine.fragments() if f.owned]
        self._weights = [f.weight for f in self._fragments]
        self._gammas = {posthoc.kind(width): posthoc.gamma_of(width) for width in profiles}
        self._averages = {kind: [w.clone() for w in self._weights] for kind in (CONSTANT, *self._gammas)}

    def kinds(self) -> list[str]:
        """The averages' names: "ema", then one a profile, in the order they were given."""
        return list(self._averages)

    def profiles(self) -> list[str]:
        """The names of those with a power-function profile."""
        return list(self._gammas)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: optimizer steps finished, the one before this update counted: 1 or more."""
        for kind, averages in self._averages.items():
            beta = self.decay if kind == CONSTANT else posthoc.decay(step, self._gammas[kind])
            torch._foreach_lerp_(averages, self._weights, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self, read: Callable[[str, str, int, int], Tensor]) -> None:
        """read(kind, name, start, stop) gives fp32 elements of a flattened parameter's average."""
        for kind, averages in self._averages.items():
            for fragment, average in zip(self._fragments, averages, strict=True):
                average.copy_(read(kind, fragment.name, fragment.start, fragment.stop))

    def tensors(self, kind: str = CONSTANT) -> list[Tensor]:
        """A kind's averages, in the order of the engine's owned fragments; live, they change with every update."""
        return self._averages[kind]
