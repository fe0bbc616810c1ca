"""Latent shards: the WebDataset format, its writer, and the manifest that vouches for it.

A sample is `KEY.cls` (its label as text) and `KEY.latent.npy` (float16, (2, C, H, W): the latents of the image
and of its mirror image, scaled to unit variance), in a plain USTAR archive. Every sample takes the same number
of bytes, so a shard is a strided array: reading a run of samples is one range read and no loop in Python.
The manifest holds a hash for every chunk, the unit in which shards are read. WebDatasets of other makers, whose
samples differ in size, get a manifest of layout 'general' (data/index.py).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from dico_ray.config import ConfigError, UserError
from dico_ray.data.order import chunk_sizes
from dico_ray.storage import Storage

FORMAT = "dico-ray-latents/1"
MANIFEST = "manifest.json"
MEMBERS = ("latent.npy", "cls")
LAYOUTS = ("strided", "general")
CONTENTS = {"latents": 1, "moments": 2}
"""What the arrays are, and how many of their channels belong to one of a latent's."""
_BLOCK = 512  # of a tar archive
_MTIME = 1  # an integer: otherwise each member gets a PAX header and the stride is lost
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class ShardError(UserError, ValueError):
    """A shard or manifest that is not what it should be: names the shard, the offset and what is wrong."""


@dataclass(frozen=True)
class LatentBatch:
    """One rank's rows of one step, as the training loop takes them.

    latents: (B, C, H, W) float16, unit variance, or their moments (B, 2C, H, W). labels: (B,) int64 in [0, classes).
    keys: (B,) int64, each sample's place in the data set. rows: (B,) int64, each sample's place in the global batch.
    """

    step: int
    rows: np.ndarray
    latents: np.ndarray
    labels: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Shard:
    """One archive. hashes: XXH3-128 of each chunk's bytes, in order.

    offsets: only of layout 'general': where each chunk begins in the archive, and where the last one ends.
    """

    name: str
    count: int
    bytes: int
    hashes: tuple[str, ...]
    offsets: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Shard:
        return cls(**{**entry, "hashes": tuple(entry["hashes"]), "offsets": tuple(entry["offsets"])})


@dataclass(frozen=True)
class Manifest:
    """What a data set of latents is. Sizes in samples unless named bytes; latent_size is (height, width).

    layout: 'strided' (ours: every sample takes sample_bytes) or 'general' (members found by name, sample_bytes 0).
    members: extensions of a sample's latents and label. flips: 2 if the mirrored image's latents follow the plain
    ones, 1 if there are none. content: 'latents', or 'moments': means and log variances, C channels of each.
    """

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
    layout: str = "strided"
    members: tuple[str, str] = MEMBERS
    flips: int = 2
    content: str = "latents"
    format: str = field(default=FORMAT)

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, of which 'moments' hold two each."""
        return self.channels // CONTENTS[self.content]

    @cached_property
    def chunks(self) -> list[tuple[Shard, int]]:
        """Every chunk as (shard, its number in that shard), in the data set's order."""
        return [(shard, i) for shard in self.shards for i in range(len(shard.hashes))]

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return chunk_sizes([shard.count for shard in self.shards], self.chunk_samples)

    def span(self, chunk: int) -> tuple[Shard, int, int, int]:
        """Where a chunk lies: (shard, its number in that shard, first byte, end)."""
        shard, number = self.chunks[chunk]
        if self.layout == "general":
            return shard, number, shard.offsets[number], shard.offsets[number + 1]
        first = number * self.chunk_samples
        last = min(first + self.chunk_samples, shard.count)
        return shard, number, first * self.sample_bytes, last * self.sample_bytes

    @property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.to_json().encode())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def load(cls, storage: Storage, setting: str = "data.latents") -> Manifest:
        """Reads a data set's manifest. setting: which one named the folder, for errors.

        Raises ConfigError if there is none (a wrong folder), ShardError if it is damaged or contradicts itself.
        """
        try:
            raw = json.loads(storage.read(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{setting}: {storage.url} has no {MANIFEST}; name a folder that `dico-ray encode` finished"
            ) from None
        except ValueError as error:
            raise ShardError(f"{storage.url}/{MANIFEST} is not JSON ({error}); run `dico-ray encode` again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise ShardError(f"{storage.url}/{MANIFEST}: format {found!r}, this version reads {FORMAT!r}")
        try:
            shards = tuple(Shard.from_json(entry) for entry in raw.pop("shards"))
            pair = (int(raw["latent_size"][0]), int(raw["latent_size"][1]))
            tuples = {name: tuple(raw[name]) for name in ("classes", "skipped", "members")}
            manifest = cls(**{**raw, **tuples, "shards": shards, "latent_size": pair})
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ShardError(f"{storage.url}/{MANIFEST} lacks or misnames a field: {error}") from None
        manifest._check(storage)
        return manifest

    def _check(self, storage: Storage) -> None:
        known = self.layout in LAYOUTS and self.content in CONTENTS
        if not known or self.flips not in (1, 2) or len(self.members) != 2:
            raise ShardError(
                f"{storage.url}/{MANIFEST}: layout {self.layout!r}, content {self.content!r}, flips {self.flips!r}, "
                f"members {self.members!r} are not what this version reads (a layout of {LAYOUTS}, a content of "
                f"{tuple(CONTENTS)}, 1 or 2 flips, two members)"
            )
        strided = self.layout == "strided"
        numbers = {
            "chunk_samples": self.chunk_samples, "channels": self.channels, "latent_size": min(self.latent_size),
            **({"sample_bytes": self.sample_bytes} if strided else {}),
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
            bounds = (0, *shard.offsets, shard.bytes)
            fits = shard.bytes >= shard.count * self.sample_bytes if strided else (
                len(shard.offsets) == chunks + 1 and all(a <= b for a, b in pairwise(bounds))
            )  # fmt: skip
            if len(shard.hashes) != chunks or not fits:
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
    data = _archive(MEMBERS[0], keys, latents, labels)
    stride = sample_bytes(*latents.shape[2:])
    end = len(keys) * stride
    assert not any(data[end:]) and len(data) - end <= 2 * 10240, "webdataset wrote members of another size"
    storage.write(name, data)
    hashes = [xxhash.xxh3_128_hexdigest(piece) for piece in _pieces(data, end, chunk_samples * stride)]
    return Shard(name, len(keys), len(data), tuple(hashes))


def _archive(kind: str, keys: Sequence[str], latents: np.ndarray, labels: Sequence[int]) -> bytes:
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    writer = TarWriter(buffer, mtime=_MTIME)
    for key, pair, label in zip(keys, latents, labels, strict=True):
        writer.write({"__key__": key, kind: pair, "cls": str(int(label))})
    writer.close()
    return buffer.getvalue()


def write_plain(storage: Storage, name: str, keys: Sequence[str], latents: np.ndarray, labels: Sequence[int]) -> None:
    """An archive for other tools: KEY.npy (flips, C, H, W) and KEY.cls."""
    storage.write(name, _archive("npy", keys, latents, labels))


def _pieces(data: bytes, end: int, step: int) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : min(start + step, end)] for start in range(0, end, step))
