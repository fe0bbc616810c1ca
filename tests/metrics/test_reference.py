from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from dico_ray.config import ConfigError
from dico_ray.metrics import Features, Reference, Statistics


def _file(**arrays: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    buffer.seek(0)
    return buffer


def test_adms_statistics_are_read_by_their_names() -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(4,) * (1 + ("sigma" in name))) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    found = Reference.read(_file(**arrays, arr_0=np.zeros((2, 8, 8, 3), np.uint8)), "x")
    assert found.pool is not None
    assert found.spatial is not None
    assert np.array_equal(found.pool[1], arrays["sigma"])
    assert np.array_equal(found.spatial[0], arrays["mu_s"])
    assert (found.features, found.images) == (None, 0)


def test_images_alone_have_no_statistics() -> None:
    assert Reference.read(_file(arr_0=np.zeros((2, 8, 8, 3), np.uint8)), "x") == Reference()


def test_ours_come_back_bit_for_bit() -> None:
    statistics = Statistics(every=2)
    statistics.add(0, Features(torch.randn(9, 4), torch.randn(9, 3), None))
    reference = Reference.of(statistics)
    found = Reference.read(io.BytesIO(reference.to_bytes()), "x")
    assert found.pool is not None
    assert found.spatial is not None
    assert found.features is not None
    assert reference.pool is not None
    assert np.array_equal(found.pool[1], reference.pool[1])
    assert found.features.shape == (5, 4)
    assert found.images == 9


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ref.npz: has one of mu and sigma"):
        Reference.read(_file(mu=np.zeros(3)), "ref.npz")
    with pytest.raises(ConfigError, match="ref.npz: not a readable .npz"):
        Reference.read(io.BytesIO(b"nothing of the kind"), "ref.npz")
    whole = _file(mu=np.zeros(3), sigma=np.eye(3)).getvalue()
    with pytest.raises(ConfigError, match="ref.npz: not a readable .npz"):
        Reference.read(io.BytesIO(whole[: len(whole) // 2]), "ref.npz")
    with pytest.raises(ConfigError, match="not a readable .npz"):  # a pickle within
        Reference.read(_file(mu=np.array([{}], dtype=object), sigma=np.eye(3)), "ref.npz")
