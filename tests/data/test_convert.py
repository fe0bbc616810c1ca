from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dico_ray.config import ConfigError
from dico_ray.data import convert, index
from dico_ray.data.reader import Samples, read_chunks
from dico_ray.data.shards import Manifest, ShardError
from dico_ray.settings import build
from dico_ray.storage import Storage
from tests.conftest import write_latents

CONFIG = build({"encode": {"shard_samples": 10, "chunk_bytes": 8192}})
LATENTS = np.random.default_rng(0).standard_normal((25, 2, 4, 8, 8)).astype(np.float32)
LABELS = [i % 7 for i in range(25)]


def run(source: Path, target: Path, kind: str, scale: float = 1.0) -> None:
    convert.main(CONFIG, verbose=False, source=str(source), target=str(target), kind=kind, scale=scale)


def read_all(folder: Path) -> tuple[Samples, Manifest]:
    storage = Storage(str(folder))
    manifest = Manifest.load(storage)
    return read_chunks(storage, manifest, range(len(manifest.chunks))), manifest


def write_dit(root: Path, latents: np.ndarray) -> None:
    for name in ("imagenet_features", "imagenet_labels"):
        (root / name).mkdir(parents=True)
    for i, latent in enumerate(latents):
        np.save(root / "imagenet_features" / f"{i}.npy", latent)
        np.save(root / "imagenet_labels" / f"{i}.npy", np.array([LABELS[i]]))


def test_dit_features_in_their_order(tmp_path: Path) -> None:
    write_dit(tmp_path / "in", LATENTS)
    run(tmp_path / "in", tmp_path / "out", "dit")
    samples, manifest = read_all(tmp_path / "out")
    assert np.array_equal(samples.latents, LATENTS.astype(np.float16))
    assert samples.labels.tolist() == LABELS
    assert [shard.count for shard in manifest.shards] == [10, 10, 5]
    assert len(manifest.classes) == 7
    assert np.allclose(manifest.statistics["std"], LATENTS.std((0, 1, 3, 4)), rtol=1e-3)


def test_lightning_latents_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.array_split(np.arange(25), 2)):
        plain, mirrored = (torch.from_numpy(LATENTS[part, flip].copy()) for flip in (0, 1))
        tensors = {"latents": plain, "latents_flip": mirrored, "labels": torch.tensor([LABELS[i] for i in part])}
        save_file(tensors, tmp_path / "in" / f"latents_{number}.safetensors")
    run(tmp_path / "in", tmp_path / "out", "lightning", 0.5)
    samples, _ = read_all(tmp_path / "out")
    assert np.array_equal(samples.latents, (LATENTS * 0.5).astype(np.float16))
    assert samples.labels.tolist() == LABELS


def test_there_and_back(tmp_path: Path) -> None:
    write_latents(tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "plain", "plain")
    assert not (tmp_path / "plain" / "manifest.json").exists()
    index.main(CONFIG, verbose=False, url=str(tmp_path / "plain"), threads=2)
    (before, _), (after, manifest) = read_all(tmp_path / "ours"), read_all(tmp_path / "plain")
    assert manifest.layout == "general"
    assert np.array_equal(before.latents, after.latents)
    assert before.labels.tolist() == after.labels.tolist()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"0 files in \*features/"):
        run(tmp_path / "empty", tmp_path / "out", "dit")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        run(tmp_path / "empty", tmp_path / "out", "lightning")
    with pytest.raises(ConfigError, match="'dat' is unknown"):
        run(tmp_path / "empty", tmp_path / "out", "dat")
    write_dit(tmp_path / "plain only", LATENTS[:, :1])
    with pytest.raises(ShardError, match="a plain and a mirrored one"):
        run(tmp_path / "plain only", tmp_path / "out", "dit")
    nan = LATENTS.copy()
    nan[3, 0, 0, 0, 0] = np.nan
    write_dit(tmp_path / "nan", nan)
    with pytest.raises(ShardError, match="000000003 hold NaN"):
        run(tmp_path / "nan", tmp_path / "out", "dit")
    np.save(tmp_path / "nan" / "imagenet_labels" / "0.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(ShardError, match="array of object is refused"):
        run(tmp_path / "nan", tmp_path / "out", "dit")
    assert not (tmp_path / "out" / "manifest.json").exists()
    write_latents(tmp_path / "full")
    with pytest.raises(ConfigError, match="holds shards already"):
        run(tmp_path / "nan", tmp_path / "full", "dit")
