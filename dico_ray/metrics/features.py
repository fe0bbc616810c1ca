"""What a feature network says of images, and what is known of a set of them: by image index, so none counts twice."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dico_ray.metrics.stats import Moments


@dataclass(frozen=True)
class Features:
    """Of N images. pool (N, D); spatial (N, S), for sFID, and logits (N, L), for the inception score, or None."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def cpu(self) -> Features:
        """On the host, in float32."""
        return Features(*(None if t is None else t.float().cpu() for t in (self.pool, self.spatial, self.logits)))  # type: ignore[arg-type]

    def first(self, count: int) -> Features:
        """Those of the first images."""
        return Features(*(None if t is None else t[:count] for t in (self.pool, self.spatial, self.logits)))  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        """Those of the first part's images, then the second's, and so on; at least one part."""

        def column(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        pool = column("pool")
        assert pool is not None
        return cls(pool, column("spatial"), column("logits"))


class FeatureNetwork(Protocol):
    """A network that is called with uint8 pixels [0, 255] (B, 3, H, W), on its device.

    name: short, for reports. hash: of all weights. image_size: the one height and width it takes; None: any.
    is_inception: whether its distance is the FID.
    """

    name: str
    hash: str
    image_size: int | None
    is_inception: bool

    def __call__(self, pixels: Tensor) -> Features: ...


class Statistics:
    """What is known of a set of images: moments of all, features and logits of each (or each `every`-th) by index.

    Args:
        every: features and logits are kept of images whose index divides by it; moments count every image.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: it must be at least 1")
        self.every = every
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self._ranges: list[tuple[int, int]] = []
        self._rows: dict[int, Features] = {}  # by the first index of their range

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(stop - start for start, stop in self._ranges)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The index ranges [start, stop) that are in it, sorted."""
        return list(self._ranges)

    def add(self, start: int, features: Features) -> None:
        """Takes in the images start, start + 1, ...

        Raises:
            ValueError: one of them is in already, or a feature is not finite; nothing is taken in then.
        """
        count = len(features.pool)
        if count == 0:
            return
        self._refuse_overlap(start, start + count)
        self.pool = _added(self.pool, features.pool)
        if features.spatial is not None:
            self.spatial = _added(self.spatial, features.spatial)
        self._keep(start, features)

    def _keep(self, start: int, features: Features) -> None:
        first = -start % self.every
        logits = features.logits
        kept = Features(
            features.pool[first :: self.every], None, None if logits is None else logits[first :: self.every]
        )
        self._ranges.insert(bisect(self._ranges, (start,)), (start, start + len(features.pool)))
        self._rows[start] = kept.cpu()

    def _refuse_overlap(self, start: int, stop: int) -> None:
        for low, high in self._ranges:
            if start < high and low < stop:
                raise ValueError(f"images {max(start, low)} to {min(stop, high) - 1} are counted already")

    def merge(self, other: Statistics) -> Statistics:
        """Takes in all that `other` has seen, and returns self; `other` is unchanged.

        Raises:
            ValueError: an image is in both, or they keep other images or are of other networks.
        """
        if other.every != self.every:
            raise ValueError(f"one keeps the features of each {self.every}th image, the other of each {other.every}th")
        for start, stop in other._ranges:
            self._refuse_overlap(start, stop)
        self.pool, self.spatial = _merged(self.pool, other.pool), _merged(self.spatial, other.spatial)
        self._ranges = sorted(self._ranges + other._ranges)
        self._rows |= other._rows
        return self

    def features(self) -> Tensor:
        """Kept pool features, in the order of the images: (n, D) float32."""
        return torch.cat([self._rows[start].pool for start, _ in self._ranges])

    def logits(self) -> Tensor | None:
        """Kept logits, in the order of the images: (n, L) float32; None where the network has none."""
        found = [self._rows[start].logits for start, _ in self._ranges]
        return torch.cat([part for part in found if part is not None]) if found and found[0] is not None else None

    def state(self) -> dict[str, np.ndarray]:
        """All it holds, as arrays to save or send."""
        arrays: dict[str, np.ndarray] = {
            "every": np.asarray(self.every),
            "ranges": np.asarray(self._ranges, np.int64).reshape(-1, 2),
        }
        for name, moments in (("pool", self.pool), ("spatial", self.spatial)):
            if moments is not None:
                arrays |= {f"{name}.{key}": value for key, value in moments.state().items()}
        if self._ranges:
            arrays["features"] = self.features().numpy()
            logits = self.logits()
            if logits is not None:
                arrays["logits"] = logits.numpy()
        return arrays

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Statistics:
        """The statistics whose `state()` this is. Raises ValueError for arrays that do not belong together."""
        new = cls(int(state["every"]))
        for name in ("pool", "spatial"):
            part = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            if part:
                setattr(new, name, Moments.from_state(part))
        new._ranges = [(int(start), int(stop)) for start, stop in state["ranges"]]
        at = 0
        for start, stop in new._ranges:
            kept = len(range(start + -start % new.every, stop, new.every))
            rows = {key: torch.tensor(state[key][at : at + kept]) for key in ("features", "logits") if key in state}
            new._rows[start] = Features(rows["features"], None, rows.get("logits"))
            at += kept
        if new._ranges and (at != len(state["features"]) or new.pool is None or new.pool.count != new.count):
            raise ValueError(f"the saved statistics are of {new.count} images, their features of {at}: make them again")
        return new


def _added(moments: Moments | None, features: Tensor) -> Moments:
    if moments is None:
        moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def _merged(mine: Moments | None, other: Moments | None) -> Moments | None:
    if other is None:
        return mine
    return (mine or Moments(other.dim)).merge(other)
