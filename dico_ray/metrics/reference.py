"""Statistics of a reference set: ADM's .npz files, and ours, which have the same names in them.

mu, sigma: of the pool features. mu_s, sigma_s: of the spatial ones. features: pool features for precision and
recall; images: how many the moments are of; right, seen: what a judge made of them (ours alone have these).
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from dico_ray.config import ConfigError
from dico_ray.metrics.features import Statistics

Gaussian = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """pool, spatial: (mean (D,), covariance (D, D)); features (n, D). None: not known. images: 0 where not told.

    right, seen (classes,): of how many images of a class a judge read that class.
    """

    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: np.ndarray | None = None
    images: int = 0
    right: np.ndarray | None = None
    seen: np.ndarray | None = None

    @classmethod
    def of(cls, statistics: Statistics, right: np.ndarray | None = None, seen: np.ndarray | None = None) -> Reference:
        """Of images of one's own, at least 2."""
        assert statistics.pool is not None
        spatial = statistics.spatial.compute() if statistics.spatial else None
        return cls(statistics.pool.compute(), spatial, statistics.features().numpy(), statistics.count, right, seen)

    def to_bytes(self) -> bytes:
        """A file that `read` takes, and, but for precision and recall, ADM's evaluator."""
        assert self.pool is not None
        arrays = {"mu": self.pool[0], "sigma": self.pool[1], "images": np.asarray(self.images)}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        rest = {"features": self.features, "right": self.right, "seen": self.seen}
        arrays |= {name: array for name, array in rest.items() if array is not None}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        return buffer.getvalue()

    @classmethod
    def read(cls, file: BinaryIO, where: str) -> Reference:
        """The statistics in an .npz, all None where it holds images alone; images (arr_0) are not read.

        Raises ConfigError, naming `where`, for a file that is damaged or has one of a pair.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                names = set(found.files)
                for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
                    if len(names & set(pair)) == 1:
                        raise ConfigError(f"{where}: has one of {pair[0]} and {pair[1]}; both are needed")
                return cls(
                    (found["mu"], found["sigma"]) if "mu" in names else None,
                    (found["mu_s"], found["sigma_s"]) if "mu_s" in names else None,
                    found["features"] if "features" in names else None,
                    int(found["images"]) if "images" in names else 0,
                    found["right"] if "right" in names else None,
                    found["seen"] if "seen" in names else None,
                )
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
            if isinstance(error, ConfigError | FileNotFoundError):
                raise
            raise ConfigError(f"{where}: not a readable .npz ({error}); copy the file again") from None
