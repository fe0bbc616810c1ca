"""The bulk reader: chunks of latent shards -> columns, each chunk by one range read and checked by its hash."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
        n, f, *shape = self.latents.shape
        whole = self.latents.reshape(n, f, -1).view(f"V{2 * int(np.prod(shape))}")[..., 0]  # a sample as one item
        return whole[places, flips].view(np.float16).reshape(len(places), *shape)


class Scratch:
    """Memory that is used again: the kernel's clearing of fresh pages costs as much as half of the reading."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8 with whatever was in it; the same memory each time."""
        if len(self._array) < size:
            self._array = np.empty(size, np.uint8)
        return self._array[:size]


def read_chunks(
    storage: Storage, manifest: Manifest, chunks: Sequence[int], cache: ChunkCache | None = None,
    scratch: Scratch | None = None,
) -> Samples:  # fmt: skip
    """The samples of these chunks, one after the other, checked against the manifest's hashes.

    scratch: memory for the archives' bytes; what is returned may lie in it, and lasts until it is used again.
    Raises ShardError, naming shard and offset, if bytes are missing or differ, or a label is out of range.
    """
    spans = [manifest.span(chunk) for chunk in chunks]
    ends = np.cumsum([stop - start for _, _, start, stop in spans])
    raw = (scratch or Scratch()).take(int(ends[-1]))
    buffer = memoryview(raw)  # pyright: ignore[reportArgumentType]
    pieces = [buffer[end - (stop - start) : end] for end, (_, _, start, stop) in zip(ends.tolist(), spans, strict=True)]
    with ThreadPoolExecutor(_RANGE_REQUESTS) as pool:
        list(pool.map(lambda chunk, piece: _fill(storage, manifest, chunk, piece, cache), chunks, pieces))

    def named(row: int) -> str:
        return _sample_at(storage, manifest, chunks, row)

    if manifest.layout == "strided":
        found = _strided(raw.reshape(-1, manifest.sample_bytes), manifest, named)
    else:
        parts = [
            general_samples(piece, manifest, where(storage, manifest, chunk))
            for chunk, piece in zip(chunks, pieces, strict=True)
        ]
        found = Samples(np.concatenate([p.latents for p in parts]), np.concatenate([p.labels for p in parts]))
    _check_labels(found.labels, manifest, named)
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


def _sample_at(storage: Storage, manifest: Manifest, chunks: Sequence[int], row: int) -> str:
    """Names the sample that is number `row` of these chunks."""
    for chunk in chunks:
        if row < manifest.chunk_sizes[chunk]:
            return f"{where(storage, manifest, chunk)}: sample {row} of the chunk"
        row -= manifest.chunk_sizes[chunk]
    raise IndexError(row)


def _strided(rows: np.ndarray, manifest: Manifest, named: Callable[[int], str]) -> Samples:
    """(N, sample_bytes) bytes of equally long samples -> columns, by strides. named(i): sample i, in errors."""
    array_at = 3 * _BLOCK
    shape, dtype, size = npy_header(rows[0, array_at:].tobytes(), named(0))
    due = (manifest.flips, manifest.channels, *manifest.latent_size)
    if size != _NPY_HEADER or dtype != np.float16 or shape != due:
        raise ShardError(f"{named(0)}: latents are {dtype} {shape}, the manifest says float16 {due}; encode again")
    headers = np.ascontiguousarray(rows[:, array_at : array_at + _NPY_HEADER]).view(f"V{_NPY_HEADER}").ravel()
    other = headers != headers[0]
    if other.any():
        raise ShardError(f"{named(int(other.argmax()))} breaks the fixed layout: its .npy header differs")
    texts = np.ascontiguousarray(rows[:, _BLOCK : _BLOCK + _LABEL_BYTES]).view(f"S{_LABEL_BYTES}").ravel()
    wrong = ~np.char.isdigit(texts)
    if wrong.any():
        raise ShardError(f"{named(int(wrong.argmax()))}: its label is not a whole number")
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
    file = io.BytesIO(data[:4096])
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=4096)
    except (ValueError, EOFError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise ShardError(f"{where}: no plain .npy array ({' '.join(str(error).split())[:200]})") from None
    if fortran or dtype.hasobject:
        raise ShardError(f"{where}: a .npy array of {dtype}{' in Fortran order' if fortran else ''} is refused")
    return shape, dtype, file.tell()


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


def _check_labels(labels: np.ndarray, manifest: Manifest, named: Callable[[int], str]) -> None:
    wrong = (labels < 0) | (labels >= len(manifest.classes))
    if wrong.any():
        row = int(wrong.argmax())
        raise ShardError(
            f"{named(row)}: its label {labels[row]} lies outside the {len(manifest.classes)} classes of the manifest"
        )
