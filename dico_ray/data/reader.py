"""The bulk reader: chunks of latent shards -> columns, each chunk by one range read and checked by its hash."""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from dico_ray.data.cache import ChunkCache
from dico_ray.data.shards import Manifest, ShardError
from dico_ray.data.tars import read_samples
from dico_ray.storage import Storage, retried

_BLOCK = 512  # of a tar archive
_LABEL_BYTES = 16  # decimal digits, padded with zeros
_NPY_HEADER = 128
LABEL_KINDS = ("cls", "label", "json", "txt")
"""Extensions under which other WebDatasets keep a label; of several, the first."""
_TRIES = 3  # of a chunk whose hash is wrong
_RANGE_REQUESTS = 8  # at a time: hides an object store's latency


@dataclass(frozen=True)
class Samples:
    """latents: (N, F, C, H, W) float16, F = 2 (plain, then mirrored) or 1; may be a strided view of the archive's
    bytes. labels: (N,) int64."""

    latents: np.ndarray
    labels: np.ndarray

    def pick(self, places: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Latents of the samples at `places`, each with its flip: (len(places), C, H, W), copied once."""
        return self.items(places, flips).view(np.float16).reshape(len(places), *self.latents.shape[2:])

    def items(self, places: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """The same as (len(places),) items of raw bytes, C * H * W float16 values in each."""
        n, f, *shape = self.latents.shape
        return self.latents.reshape(n, f, -1).view(f"V{2 * int(np.prod(shape))}")[..., 0][places, flips]


class Scratch:
    """Memory that is used again: the kernel's clearing of fresh pages costs as much as half of the reading."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8 with whatever was in it; the same memory each time."""
        if len(self._array) < size:
            self._array = np.empty(size, np.uint8)
        return self._array[:size]


_parsing = threading.Lock()  # numpy parses headers as Python, which Python 3.11 cannot do in several threads at a time
_idle: list[Scratch] = []  # this process's memory for chunks' bytes: one for each request at a time


def read_chunks(
    storage: Storage, manifest: Manifest, chunks: Sequence[int], cache: ChunkCache | None = None
) -> Samples:
    """The samples of these chunks, one after the other. Raises ShardError as `each_chunk` does."""
    sizes = manifest.chunk_sizes
    ends = np.cumsum([sizes[chunk] for chunk in chunks]).tolist()
    latents = np.empty((ends[-1], manifest.flips, manifest.channels, *manifest.latent_size), np.float16)
    labels = np.empty(ends[-1], np.int64)

    def keep(number: int, samples: Samples) -> None:
        rows = slice(ends[number] - len(samples.labels), ends[number])
        latents[rows], labels[rows] = samples.latents, samples.labels

    each_chunk(storage, manifest, chunks, keep, cache)
    return Samples(latents, labels)


def each_chunk(
    storage: Storage, manifest: Manifest, chunks: Sequence[int], use: Callable[[int, Samples], None],
    cache: ChunkCache | None = None,
) -> None:  # fmt: skip
    """Calls use(i, the samples of chunks[i]) for each chunk once it was read and checked against the manifest's hash.

    The calls come from several threads, in any order, while other chunks are on their way: the bytes are still in the
    processor's cache. The samples last until the call returns; then their memory is used again.
    Raises ShardError, naming shard and offset, if bytes are missing or differ, or a label is out of range; chunks that
    were not begun are then left, and no thread stays.
    """

    def read(number: int, chunk: int) -> None:
        _, _, start, stop = manifest.span(chunk)
        scratch = _idle.pop() if _idle else Scratch()
        try:
            raw = scratch.take(stop - start)
            _fill(storage, manifest, chunk, memoryview(raw), cache)  # pyright: ignore[reportArgumentType]
            use(number, _parsed(raw, manifest, where(storage, manifest, chunk)))
        finally:
            _idle.append(scratch)

    with ThreadPoolExecutor(_RANGE_REQUESTS) as pool:
        list(pool.map(read, range(len(chunks)), chunks))


def _parsed(raw: np.ndarray, manifest: Manifest, where: str) -> Samples:
    """One chunk's bytes -> columns. Raises ShardError."""
    if manifest.layout == "strided":
        found = _strided(raw.reshape(-1, manifest.sample_bytes), manifest, where)
    else:
        found = general_samples(memoryview(raw), manifest, where)  # pyright: ignore[reportArgumentType]
    wrong = (found.labels < 0) | (found.labels >= len(manifest.classes))
    if wrong.any():
        row = int(wrong.argmax())
        raise ShardError(
            f"{_named(where, row)}: its label {found.labels[row]} lies outside the {len(manifest.classes)} classes of "
            "the manifest"
        )
    return found


def where(storage: Storage, manifest: Manifest, chunk: int) -> str:
    shard, _, start, _ = manifest.span(chunk)
    return f"{storage.url}/{shard.name} at byte {start}"


def _fill(storage: Storage, manifest: Manifest, chunk: int, buffer: memoryview, cache: ChunkCache | None) -> None:
    """Reads one chunk's bytes into `buffer`, from the cache or the storage; they have the manifest's hash."""
    shard, number, start, stop = manifest.span(chunk)
    digest = shard.hashes[number]
    if cache and cache.read_into(digest, buffer):
        if xxhash.xxh3_128_hexdigest(buffer) == digest:
            return
        cache.drop(digest)
    at, found = where(storage, manifest, chunk), ""
    for _ in range(_TRIES):  # bytes can be damaged on their way too
        try:
            count = storage.read_into(shard.name, start, buffer)
        except FileNotFoundError:
            raise ShardError(f"{at}: the shard is gone; restore it or run `dico-ray encode` again") from None
        if count != stop - start:
            raise ShardError(f"{at}: {count} bytes where {stop - start} should be; the shard is cut short")
        found = xxhash.xxh3_128_hexdigest(buffer)
        if found == digest:
            if cache:
                cache.write(digest, buffer)
            return
        retried["hash"] += 1
    raise ShardError(f"{at}: hash {found}, the manifest says {digest}; the shard was changed")


def _named(where: str, row: int) -> str:
    return f"{where}: sample {row} of the chunk"


def _strided(rows: np.ndarray, manifest: Manifest, where: str) -> Samples:
    """(N, sample_bytes) bytes of equally long samples -> columns, by strides."""
    array_at = 3 * _BLOCK
    due = (manifest.flips, manifest.channels, *manifest.latent_size)
    headers = np.ascontiguousarray(rows[:, array_at : array_at + _NPY_HEADER]).view(f"V{_NPY_HEADER}").ravel()
    shape, dtype, size = npy_header(headers[0].tobytes(), _named(where, 0))
    if size != _NPY_HEADER or dtype != np.float16 or shape != due:
        raise ShardError(
            f"{_named(where, 0)}: latents are {dtype} {shape}, the manifest says float16 {due}; encode again"
        )
    other = headers != headers[0]
    if other.any():
        raise ShardError(f"{_named(where, int(other.argmax()))} breaks the fixed layout: its .npy header differs")
    texts = np.ascontiguousarray(rows[:, _BLOCK : _BLOCK + _LABEL_BYTES]).view(f"S{_LABEL_BYTES}").ravel()
    wrong = ~np.char.isdigit(texts)
    if wrong.any():
        raise ShardError(f"{_named(where, int(wrong.argmax()))}: its label is not a whole number")
    labels = texts.astype(np.int64)
    start = array_at + _NPY_HEADER
    values = rows[:, start : start + 2 * int(np.prod(shape))].view(np.float16)
    return Samples(values.reshape(len(rows), *shape), labels)


def general_samples(data: memoryview, manifest: Manifest, where: str) -> Samples:
    """A piece of any WebDataset, cut between samples -> columns. Raises ShardError, TarError."""
    kind, label_kind = manifest.members
    latents, labels = [], []
    for key, parts in read_samples(data, where):
        if kind not in parts or label_kind not in parts:
            raise ShardError(f"{where}: sample {key!r} has {', '.join(parts)}, not {kind} and {label_kind}")
        latents.append(npy_array(parts[kind], f"{where}: {key}.{kind}"))
        labels.append(label_index(parts[label_kind], label_kind, manifest.classes, f"{where}: {key}.{label_kind}"))
    shape = (manifest.flips, manifest.channels, *manifest.latent_size)
    wrong = next((a.shape for a in latents if a.reshape(-1, *a.shape[-3:]).shape != shape), None)
    if wrong:
        raise ShardError(f"{where}: latents of shape {wrong}, the manifest says {shape}")
    with np.errstate(over="ignore"):
        columns = np.stack([a.reshape(shape) for a in latents]).astype(np.float16)
    return Samples(columns, np.array(labels, np.int64))


def npy_header(data: memoryview | bytes, where: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes of the header) of a .npy file in C order. Raises ShardError; pickled objects too."""
    head = bytes(data[:4096])
    length = (
        10 + int.from_bytes(head[8:10], "little") if head[6:7] == b"\1" else 12 + int.from_bytes(head[8:12], "little")
    )
    try:
        shape, fortran, dtype, size = _npy_header(head[:length])
    except (ValueError, EOFError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise ShardError(f"{where}: no plain .npy array ({' '.join(str(error).split())[:200]})") from None
    if fortran or dtype.hasobject:
        raise ShardError(f"{where}: a .npy array of {dtype}{' in Fortran order' if fortran else ''} is refused")
    return shape, dtype, size


@lru_cache(maxsize=256)
def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, Fortran order, dtype, bytes of the header); numpy's errors."""
    file = io.BytesIO(data)
    with _parsing:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return *read(file, max_header_size=4096), file.tell()


def npy_array(data: memoryview, where: str) -> np.ndarray:
    """A .npy file's floating array, (C, H, W) or (F, C, H, W). Raises ShardError; never unpickles."""
    shape, dtype, start = npy_header(data, where)
    if dtype.kind != "f" or len(shape) not in (3, 4):
        raise ShardError(f"{where}: {dtype} {shape}, not floats (C, H, W) or (flips, C, H, W)")
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ShardError(f"{where}: the header claims {shape} of {dtype}, the file holds {len(data) - start} bytes")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def label_of(data: memoryview, kind: str, where: str) -> int | str:
    """A label as it is written: a number or a class name, as text (.cls, .txt) or JSON (a value, or 'label')."""
    try:
        text = bytes(data).decode().strip()
        value = json.loads(text) if kind.endswith("json") else text
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: no label ({error})") from None
    if isinstance(value, dict):
        value = next((value[name] for name in ("label", "cls", "class") if name in value), None)
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        value = int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ShardError(f"{where}: {str(value)[:80]!r} is no label: a class number of 0 or more, or a class name")


def label_index(data: memoryview, kind: str, classes: Sequence[str], where: str) -> int:
    value = label_of(data, kind, where)
    if isinstance(value, int):
        return value
    if value not in classes:
        raise ShardError(f"{where}: {value[:80]!r} is not one of the manifest's {len(classes)} classes")
    return classes.index(value)
