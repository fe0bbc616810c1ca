"""`dico-ray data index`: a manifest for a WebDataset of latents that another tool made, so that training can read it.

The shards stay as they are. A sample is a .npy member, (C, H, W) or (flips, C, H, W) of floats, and a label as
text or JSON, a number or a class's name. Shards that happen to have our fixed layout are read by strides, others
member by member, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import xxhash

from dico_ray.config import Config, ConfigError
from dico_ray.data.reader import LABEL_KINDS, label_of, npy_array
from dico_ray.data.shards import MANIFEST, MEMBERS, Manifest, Shard, ShardError, sample_bytes
from dico_ray.data.tars import TarSample, read_samples, walk_bytes
from dico_ray.progress import Progress
from dico_ray.storage import Storage


@dataclass(frozen=True)
class _Found:
    """What one archive holds."""

    shard: Shard
    samples: tuple[TarSample, ...]
    labels: tuple[int | str, ...]
    shape: tuple[int, ...]  # (flips, C, H, W)
    half: bool  # float16
    sums: np.ndarray  # (2, C): of values and of their squares


def main(config: Config, *, verbose: bool, url: str, threads: int) -> None:
    """Reads every shard once, then writes manifest.json beside them.

    Raises ConfigError where no .tar lies or a manifest stands already, ShardError or TarError, naming shard and
    sample, for what is no sample of floats and a label, for NaN, and for shards that differ in shape.
    """
    storage = Storage(url)
    if storage.exists(MANIFEST):
        raise ConfigError(f"{url} has a {MANIFEST} already; remove it to index the shards anew")
    names = storage.names(".tar")
    if not names:
        raise ConfigError(f"{url} holds no .tar files; name the folder of a WebDataset")
    first = storage.read(names[0])
    members = detect_members(first, f"{storage.url}/{names[0]}")
    average = len(first) // len(walk_bytes(first, names[0]))
    chunk = max(1, config.encode.chunk_bytes // average)
    found: list[_Found] = []
    with ThreadPoolExecutor(threads) as pool, Progress("index", len(names), "shards") as progress:
        for item in pool.map(lambda name: _scan(storage, name, members, chunk), names):
            found.append(item)
            progress.update(len(found))
    manifest = build_manifest(config, storage, members, chunk, found)
    storage.write(MANIFEST, manifest.to_json().encode())
    print(f"index: {manifest.count:,} samples in {len(manifest.shards):,} shards, {manifest.layout} layout, at {url}")


def detect_members(data: bytes, where: str) -> tuple[str, str]:
    """Extensions of a sample's latents and label, from an archive's first sample. Raises ShardError."""
    samples = read_samples(data, where)
    if not samples:
        raise ShardError(f"{where} holds no samples")
    key, parts = samples[0]
    arrays = [kind for kind in parts if kind == "npy" or kind.endswith(".npy")]
    labels = [kind for kind in LABEL_KINDS if kind in parts]
    if len(arrays) != 1 or not labels:
        raise ShardError(
            f"{where}: sample {key!r} has {', '.join(parts)}; one .npy member and a label ({', '.join(LABEL_KINDS)}) "
            "are needed"
        )
    return arrays[0], labels[0]


def _scan(storage: Storage, name: str, members: tuple[str, str], chunk: int) -> _Found:
    data, at = storage.read(name), f"{storage.url}/{name}"
    samples = walk_bytes(data, at)
    arrays, labels = [], []
    for sample in samples:
        missing = [kind for kind in members if kind not in sample.parts]
        if missing:
            raise ShardError(f"{at}: sample {sample.key!r} lacks {missing[0]}, which the first sample has")
        (a, size), (b, length) = (sample.parts[kind] for kind in members)
        array = npy_array(memoryview(data)[a : a + size], f"{at}: {sample.key}.{members[0]}")
        if not np.isfinite(array).all() or np.abs(array).max() > np.finfo(np.float16).max:
            raise ShardError(f"{at}: the latents of {sample.key} hold NaN, or more than float16 can")
        arrays.append(array.reshape(-1, *array.shape[-3:]))
        labels.append(label_of(memoryview(data)[b : b + length], members[1], f"{at}: {sample.key}.{members[1]}"))
    if not arrays or len({a.shape for a in arrays}) != 1 or arrays[0].shape[0] > 2:
        shapes = sorted({a.shape for a in arrays})
        raise ShardError(f"{at}: latents of shapes {shapes}; one shape is needed, with at most two flips")
    values = np.stack(arrays).astype(np.float64)
    sums = np.stack([values.sum((0, 1, 3, 4)), (values**2).sum((0, 1, 3, 4))])
    half = all(a.dtype == np.float16 for a in arrays)
    offsets = (*(sample.start for sample in samples[::chunk]), samples[-1].stop)
    hashes = tuple(xxhash.xxh3_128_hexdigest(memoryview(data)[a:b]) for a, b in pairwise(offsets))
    shard = Shard(name, len(samples), len(data), hashes, offsets)
    return _Found(shard, tuple(samples), tuple(labels), arrays[0].shape, half, sums)


def build_manifest(
    config: Config, storage: Storage, members: tuple[str, str], chunk: int, found: Sequence[_Found]
) -> Manifest:
    """Joins what the archives hold. Raises ShardError if they differ in shape or in how labels are written."""
    shapes = {f.shape: f.shard.name for f in found}
    if len(shapes) != 1:
        raise ShardError(f"{storage.url}: shards differ in their latents' shape: {shapes}")
    (shape,) = shapes
    labels = [label for f in found for label in f.labels]
    if len({type(label) for label in labels}) != 1:
        raise ShardError(f"{storage.url}: some labels are numbers and some are names; take one kind")
    numbers = [label for label in labels if isinstance(label, int)]
    classes = [str(i) for i in range(max(numbers) + 1)] if numbers else sorted({str(label) for label in labels})
    stride = sample_bytes(*shape[1:])
    strided = members == MEMBERS and shape[0] == 2 and all(_is_strided(f, stride) for f in found)
    count = sum(len(f.samples) for f in found) * int(np.prod(shape)) // shape[1]
    mean, squares = np.sum([f.sums for f in found], axis=0) / count
    return Manifest(
        shards=tuple(replace(f.shard, offsets=()) if strided else f.shard for f in found),
        chunk_samples=chunk, sample_bytes=stride if strided else 0, channels=shape[1],
        latent_size=(shape[2], shape[3]), classes=tuple(classes), image_size=config.encode.image_size,
        codec={"vae": config.codec.vae, "hash": ""},
        statistics={"mean": mean.tolist(), "std": np.sqrt(squares - mean**2).tolist()},
        layout="strided" if strided else "general", members=members, flips=shape[0],
    )  # fmt: skip


def _is_strided(found: _Found, stride: int) -> bool:
    return found.half and all(
        sample.start == i * stride
        and sample.parts["cls"][0] == sample.start + 512
        and sample.parts["latent.npy"][0] == sample.start + 1536
        and sample.stop == (i + 1) * stride
        for i, sample in enumerate(found.samples)
    )
