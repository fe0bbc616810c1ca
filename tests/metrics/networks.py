"""An Inception with random weights that keep its activations alive, for tests that compare two uses of one network."""

from __future__ import annotations

from pathlib import Path

import torch

from dico_ray.bench.evaluate import untrained


def random_inception(path: Path, seed: int = 0) -> Path:
    """Writes weights by torch-fidelity's names to `path`, and returns it."""
    torch.save(untrained(seed), path)
    return path
