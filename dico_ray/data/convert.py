"""`dico-ray data convert`: latents that other projects stored -> latent shards, and shards -> a plain WebDataset.

dit        fast-DiT and DiCo: FOLDER/*_features/I.npy (2 or 1, C, H, W) scaled, FOLDER/*_labels/I.npy (1,)
lightning  LightningDiT: FOLDER/*.safetensors with latents, latents_flip (N, C, H, W), unscaled, and labels (N,)
plain      from our shards: KEY.npy (flips, C, H, W) float16 and KEY.cls, without a manifest
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dico_ray.config import Config, ConfigError
from dico_ray.data.reader import npy_array, npy_header, read_chunks
from dico_ray.data.shards import MANIFEST, Manifest, Shard, ShardError, sample_bytes, write_plain, write_shard
from dico_ray.progress import Progress
from dico_ray.storage import Storage

KINDS = ("dit", "lightning", "plain")


def main(config: Config, *, verbose: bool, source: str, target: str, kind: str, scale: float) -> None:
    """Converts `source` to `target` (folders or URLs).

    kind: one of KINDS. scale: multiplies the values ('lightning' stores them unscaled; 0.18215 for Stable
    Diffusion's autoencoder). Shards are as large as encode.shard_samples says. Raises ConfigError for a target that
    has a manifest or a source that is not of the kind, ShardError for arrays that are no latents.
    """
    if kind not in KINDS:
        raise ConfigError(f"--kind: {kind!r} is unknown; take one of {', '.join(KINDS)}")
    here, there = Storage(source), Storage(target)
    if there.names(".tar") or there.exists(MANIFEST):
        raise ConfigError(f"{target} holds shards already; name an empty folder")
    if kind == "plain":
        _to_plain(here, there)
        return
    rows = _Dit(here) if kind == "dit" else _Lightning(here)
    manifest = _write(config, rows, there, scale)
    there.write(MANIFEST, manifest.to_json().encode())
    print(f"convert: {manifest.count:,} samples in {len(manifest.shards):,} shards at {there.url}")


class _Dit:
    """One .npy file an image, numbered."""

    def __init__(self, storage: Storage) -> None:
        names = storage.names(".npy")
        features = {n.rsplit("/", 1)[-1]: n for n in names if "features/" in n}
        labels = {n.rsplit("/", 1)[-1]: n for n in names if "labels/" in n}
        if not features or features.keys() != labels.keys():
            raise ConfigError(
                f"{storage.url} has {len(features)} files in *features/ and {len(labels)} in *labels/; a folder of "
                "features and one of labels with the same file names are needed"
            )
        self._storage = storage
        self._pairs = [(features[n], labels[n]) for n in sorted(features, key=lambda n: (len(n), n))]
        self.count = len(self._pairs)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for feature, label in self._pairs:
            where = f"{self._storage.url}/{feature}"
            array = npy_array(memoryview(self._storage.read(feature)), where)
            data = self._storage.read(label)
            shape, dtype, start = npy_header(data, f"{self._storage.url}/{label}")
            if dtype.kind not in "iu" or int(np.prod(shape)) != 1:
                raise ShardError(f"{self._storage.url}/{label}: {dtype} {shape}, not one whole number")
            yield array.reshape(-1, *array.shape[-3:]), int(np.frombuffer(data, dtype, 1, start)[0])


class _Lightning:
    """Safetensors of many images each."""

    def __init__(self, storage: Storage) -> None:
        from safetensors import SafetensorError

        self._storage, self._names = storage, storage.names(".safetensors")
        self._error = SafetensorError
        if not self._names:
            raise ConfigError(f"{storage.url} holds no .safetensors files")
        self.count = sum(len(self._load(name)["labels"]) for name in self._names)

    def _load(self, name: str) -> dict[str, np.ndarray]:
        from safetensors.torch import load

        where = f"{self._storage.url}/{name}"
        try:
            tensors = load(self._storage.read(name))
        except self._error as error:
            raise ShardError(f"{where}: not a safetensors file ({error})") from None
        missing = {"latents", "labels"} - tensors.keys()
        if missing:
            raise ShardError(f"{where} has {', '.join(tensors)}; {', '.join(sorted(missing))} is missing")
        if len({len(tensors[k]) for k in ("latents", "latents_flip", "labels") if k in tensors}) != 1:
            raise ShardError(f"{where}: latents, latents_flip and labels differ in length")
        return {k: v.float().numpy() if v.is_floating_point() else v.numpy() for k, v in tensors.items()}

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for name in self._names:
            found = self._load(name)
            flips = [found[k] for k in ("latents", "latents_flip") if k in found]
            for i, label in enumerate(found["labels"].ravel().tolist()):
                yield np.stack([flip[i] for flip in flips]), int(label)


@dataclass
class _Sums:
    """Running sums of a channel's values and their squares."""

    total: Any = 0.0
    squares: Any = 0.0

    def add(self, values: np.ndarray) -> None:
        wide = values.astype(np.float64)
        self.total = self.total + wide.sum((0, 1, 3, 4))
        self.squares = self.squares + (wide**2).sum((0, 1, 3, 4))


def _write(config: Config, rows: _Dit | _Lightning, target: Storage, scale: float) -> Manifest:
    shards: list[Shard] = []
    sums, chunk, most, done = _Sums(), 1, 0, 0
    shape = tuple[int, ...]()
    stream = iter(rows)
    with Progress("convert", rows.count, "samples") as progress:
        while batch := list(islice(stream, config.encode.shard_samples)):
            if {array.shape for array, _ in batch} != {shape or batch[0][0].shape}:
                raise ShardError(f"samples differ in shape: {sorted({array.shape for array, _ in batch})}, {shape}")
            shape = batch[0][0].shape
            if shape[0] != 2:
                raise ShardError(f"latents of shape {shape}; a plain and a mirrored one, (2, C, H, W), are needed")
            with np.errstate(over="ignore"):  # infinite values are refused by the writer, by name
                latents = (np.stack([array for array, _ in batch]).astype(np.float32) * scale).astype(np.float16)
            labels = [label for _, label in batch]
            chunk = max(1, config.encode.chunk_bytes // sample_bytes(*shape[1:]))
            keys = [f"{done + i:09d}" for i in range(len(batch))]
            shards.append(write_shard(target, f"shard-{len(shards):05d}.tar", keys, latents, labels, chunk))
            sums.add(latents)
            most, done = max(most, *labels), done + len(batch)
            progress.update(done)
    values = done * 2 * shape[2] * shape[3]
    mean = sums.total / values
    return Manifest(
        shards=tuple(shards), chunk_samples=chunk, sample_bytes=sample_bytes(*shape[1:]), channels=shape[1],
        latent_size=(shape[2], shape[3]), classes=tuple(str(i) for i in range(most + 1)),
        image_size=config.encode.image_size, codec={"vae": config.codec.vae, "hash": "", "scale": scale},
        statistics={"mean": mean.tolist(), "std": np.sqrt(sums.squares / values - mean**2).tolist()},
    )  # fmt: skip


def _to_plain(source: Storage, target: Storage) -> None:
    manifest = Manifest.load(source)
    if manifest.content == "moments":
        raise ConfigError(f"{source.url} holds means and log variances, which no other tool reads; encode samples")
    chunk, done = 0, 0
    with Progress("convert", manifest.count, "samples") as progress:
        for shard in manifest.shards:
            chunks = range(chunk, chunk + len(shard.hashes))
            samples = read_chunks(source, manifest, chunks)
            keys = [f"{done + i:09d}" for i in range(shard.count)]
            write_plain(target, shard.name, keys, samples.latents, samples.labels.tolist())
            chunk, done = chunks.stop, done + shard.count
            progress.update(done)
    print(f"convert: {done:,} samples in {len(manifest.shards):,} archives at {target.url}")
