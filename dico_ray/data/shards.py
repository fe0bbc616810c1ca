"""Latent shards: the WebDataset format, the manifest that vouches for it, and the bulk reader.

A sample is `KEY.cls` (its label as text) and `KEY.latent.npy` (float16, (2, C, H, W): the latents of the image
and of its mirror image, scaled to unit variance), in a plain USTAR archive. Every sample takes the same number
of bytes, so a shard is a strided array: reading a run of samples is one range read and no loop in Python.
The manifest holds a hash for every chunk, the unit in which shards are read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from dico_ray.config import ConfigError, UserError
from dico_ray.data.order import chunk_sizes
from dico_ray.storage import Storage

FORMAT = "dico-ray-latents/1"
MANIFEST = "manifest.json"
_BLOCK = 512  # of a tar archive
_MTIME = 1  # an integer: otherwise each member gets a PAX header and the stride is lost
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class ShardError(UserError, ValueError):
    """A shard or manifest that is not what it should be: names the shard, the offset and what is wrong."""


@dataclass(frozen=True)
class LatentBatch:
    """One rank's rows of one step, as the training loop takes them.

    latents: (B, C, H, W) float16, unit variance. labels: (B,) int64 in [0, classes). keys: (B,) int64, each
    sample's place in the data set. rows: (B,) int64, each sample's place in the global batch.
    """

    step: int
    rows: np.ndarray
    latents: np.ndarray
    labels: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Shard:
    """One archive. hashes: XXH3-128 of each chunk's bytes, in order."""

    name: str
    count: int
    bytes: int
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a data set of latents is. Sizes in samples unless named bytes; latent_size is (height, width)."""

    shards: tuple[Shard, ...]
    chunk_samples: int
    sample_bytes: int
    channels: int
    latent_size: tuple[int, int]
    classes: tuple[str, ...]
    image_size: int
    codec: dict[str, Any]
    statistics: dict[str, list[float]]
    skipped: tuple[str, ...] = ()
    format: str = field(default=FORMAT)

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @cached_property
    def chunks(self) -> list[tuple[Shard, int]]:
        """Every chunk as (shard, its number in that shard), in the data set's order."""
        return [(shard, i) for shard in self.shards for i in range(len(shard.hashes))]

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return chunk_sizes([shard.count for shard in self.shards], self.chunk_samples)

    @property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.to_json().encode())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, storage: Storage) -> Manifest:
        """Reads a data set's manifest.

        Raises ConfigError if there is none (a wrong folder), ShardError if it is damaged or contradicts itself.
        """
        try:
            raw = json.loads(storage.read(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"data.latents: {storage.url} has no {MANIFEST}; name a folder that `dico-ray encode` finished"
            ) from None
        except ValueError as error:
            raise ShardError(f"{storage.url}/{MANIFEST} is not JSON ({error}); run `dico-ray encode` again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise ShardError(f"{storage.url}/{MANIFEST}: format {found!r}, this version reads {FORMAT!r}")
        try:
            shards = tuple(Shard(**{**s, "hashes": tuple(s["hashes"])}) for s in raw.pop("shards"))
            pair = (int(raw["latent_size"][0]), int(raw["latent_size"][1]))
            tuples = {name: tuple(raw[name]) for name in ("classes", "skipped")}
            manifest = cls(**{**raw, **tuples, "shards": shards, "latent_size": pair})
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ShardError(f"{storage.url}/{MANIFEST} lacks or misnames a field: {error}") from None
        manifest._check(storage)
        return manifest

    def _check(self, storage: Storage) -> None:
        numbers = {
            "chunk_samples": self.chunk_samples, "sample_bytes": self.sample_bytes, "channels": self.channels,
            "latent_size": min(self.latent_size),
            **{f"{shard.name}: count": shard.count for shard in self.shards},
            **{f"{shard.name}: bytes": shard.bytes for shard in self.shards},
        }  # fmt: skip
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShardError(
                    f"{storage.url}/{MANIFEST}: {name} is {value!r}, not a positive whole number; "
                    "run `dico-ray encode` again"
                )
        for shard in self.shards:
            chunks = -(-shard.count // self.chunk_samples)
            if shard.count < 1 or len(shard.hashes) != chunks or shard.bytes < shard.count * self.sample_bytes:
                raise ShardError(
                    f"{storage.url}/{MANIFEST}: {shard.name} claims {shard.count} samples in {shard.bytes} bytes with "
                    f"{len(shard.hashes)} hashes, which do not fit together; run `dico-ray encode` again"
                )
        if not self.shards:
            raise ShardError(f"{storage.url}/{MANIFEST} lists no shards; run `dico-ray encode` again")


def sample_bytes(channels: int, height: int, width: int) -> int:
    """Bytes that one sample takes in a shard: two headers, a label block, and the array with its .npy header."""
    payload = 128 + 2 * channels * height * width * 2
    return 3 * _BLOCK + -(-payload // _BLOCK) * _BLOCK


def write_shard(
    storage: Storage, name: str, keys: Sequence[str], latents: np.ndarray, labels: Sequence[int], chunk_samples: int
) -> Shard:
    """Writes one shard (whole or not at all) and says what the manifest needs to know of it.

    keys: different, at most 80 letters, digits, - and _. latents: (N, 2, C, H, W) float16. labels: N of 0 or more.
    Raises ShardError for another shape or dtype, for values that are not finite (also beyond float16), and for keys
    that readers could take apart wrongly.
    """
    from webdataset.writer import TarWriter

    if latents.dtype != np.float16 or latents.ndim != 5 or latents.shape[1] != 2:
        raise ShardError(f"{name}: latents are {latents.dtype} {latents.shape}, not float16 (N, 2, C, H, W)")
    wrong = next((key for key in keys if not _KEY.fullmatch(key)), None)
    if wrong is not None or len(set(keys)) != len(keys):
        raise ShardError(
            f"{name}: keys must differ and be 1 to 80 letters, digits, - and _; found {wrong or 'twins'!r}"
        )
    bad = ~np.isfinite(latents).all(axis=(1, 2, 3, 4))
    if bad.any():
        key = keys[int(bad.argmax())]
        raise ShardError(f"{name}: the latents of {key} hold NaN or more than float16's {_FLOAT16_MAX:.0f}")
    buffer = io.BytesIO()
    writer = TarWriter(buffer, mtime=_MTIME)
    for key, pair, label in zip(keys, latents, labels, strict=True):
        writer.write({"__key__": key, "latent.npy": pair, "cls": str(int(label))})
    writer.close()
    data = buffer.getvalue()
    stride = sample_bytes(*latents.shape[2:])
    end = len(keys) * stride
    assert not any(data[end:]) and len(data) - end <= 2 * 10240, "webdataset wrote members of another size"
    storage.write(name, data)
    hashes = [xxhash.xxh3_128_hexdigest(piece) for piece in _pieces(data, end, chunk_samples * stride)]
    return Shard(name, len(keys), len(data), tuple(hashes))


def _pieces(data: bytes, end: int, step: int) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : min(start + step, end)] for start in range(0, end, step))


@dataclass(frozen=True)
class Samples:
    """latents: (N, 2, C, H, W) float16, plain then mirrored. labels: (N,) int64. names: (N,) the keys as text."""

    latents: np.ndarray
    labels: np.ndarray
    names: np.ndarray


def read_chunk(storage: Storage, manifest: Manifest, chunk: int) -> Samples:
    """One chunk by one range read, checked against the manifest's hash.

    Raises ShardError, naming shard and offset, if bytes are missing or differ, or a label is out of range.
    """
    shard, number = manifest.chunks[chunk]
    first = number * manifest.chunk_samples
    count = min(manifest.chunk_samples, shard.count - first)
    start, stop = first * manifest.sample_bytes, (first + count) * manifest.sample_bytes
    where = f"{storage.url}/{shard.name} at byte {start}"
    try:
        data = storage.read(shard.name, start, stop)
    except FileNotFoundError:
        raise ShardError(f"{where}: the shard is gone; restore it or run `dico-ray encode` again") from None
    if len(data) != stop - start:
        raise ShardError(f"{where}: {len(data)} bytes where {stop - start} should be; the shard is cut short")
    found = xxhash.xxh3_128_hexdigest(data)
    if found != shard.hashes[number]:
        raise ShardError(f"{where}: hash {found}, the manifest says {shard.hashes[number]}; the shard was changed")
    samples = _parse(data, count, where)
    if samples.latents.shape[2:] != (manifest.channels, *manifest.latent_size):
        raise ShardError(f"{where}: latents {samples.latents.shape[2:]} differ from the manifest's shape")
    if not ((samples.labels >= 0) & (samples.labels < len(manifest.classes))).all():
        raise ShardError(f"{where}: a label lies outside the {len(manifest.classes)} classes of the manifest")
    return samples


def _parse(data: bytes, count: int, where: str) -> Samples:
    """A run of equally long samples -> columns, by strides. `where` goes into errors."""
    rows = np.frombuffer(data, np.uint8).reshape(count, -1)
    label_at, array_at = _BLOCK, 3 * _BLOCK
    header = io.BytesIO(rows[0, array_at : array_at + 128].tobytes())
    try:
        np.lib.format.read_magic(header)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    except ValueError as error:
        raise ShardError(f"{where}: no .npy array where the fixed layout has one ({error})") from None
    if dtype != np.float16 or fortran or len(shape) != 4 or shape[0] != 2:
        raise ShardError(f"{where}: latents are {dtype} {shape}, not float16 (2, C, H, W)")
    names = np.ascontiguousarray(rows[:, :100]).view("S100").ravel()
    twins = np.ascontiguousarray(rows[:, 2 * _BLOCK : 2 * _BLOCK + 100]).view("S100").ravel()
    stems = np.char.partition(names, b".")[:, 0]
    same = (names == np.char.add(stems, b".cls")) & (twins == np.char.add(stems, b".latent.npy"))
    same &= (rows[:, array_at : array_at + 128] == rows[0, array_at : array_at + 128]).all(axis=1)
    if not same.all():
        raise ShardError(f"{where}: sample {int((~same).argmax())} of the chunk breaks the fixed layout")
    try:
        labels = np.ascontiguousarray(rows[:, label_at : label_at + 16]).view("S16").ravel().astype(np.int64)
    except ValueError:
        raise ShardError(f"{where}: a label is not a whole number") from None
    start = array_at + 128
    size = int(np.prod(shape)) * 2
    latents = np.ascontiguousarray(rows[:, start : start + size]).view(np.float16).reshape(count, *shape)
    return Samples(latents, labels, stems)
