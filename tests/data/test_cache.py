from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from dico_ray.config import ConfigError
from dico_ray.data import reader
from dico_ray.data.cache import ChunkCache
from dico_ray.data.reader import read_chunks
from dico_ray.storage import Storage
from tests.conftest import write_latents


def test_a_second_read_needs_no_storage(tmp_path: Path) -> None:
    manifest = write_latents(tmp_path / "data")
    storage, cache = Storage(str(tmp_path / "data")), ChunkCache(str(tmp_path / "cache"), 10**9)
    chunks = range(len(manifest.chunks))
    first = read_chunks(storage, manifest, chunks, cache)
    for shard in manifest.shards:
        (tmp_path / "data" / shard.name).unlink()
    again = read_chunks(storage, manifest, chunks, cache)
    assert again.latents.tobytes() == first.latents.tobytes()
    assert again.labels.tolist() == first.labels.tolist()


def test_a_damaged_chunk_is_dropped_and_read_anew(tmp_path: Path) -> None:
    manifest = write_latents(tmp_path / "data")
    storage, cache = Storage(str(tmp_path / "data")), ChunkCache(str(tmp_path / "cache"), 10**9)
    first = read_chunks(storage, manifest, [0, 1], cache)
    digests = manifest.shards[0].hashes[:2]
    files = [tmp_path / "cache" / digest for digest in digests]
    good = files[0].read_bytes()
    files[0].write_bytes(b"\0" + good[1:])
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert read_chunks(storage, manifest, [0, 1], cache).latents.tobytes() == first.latents.tobytes()
    assert [xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files] == list(digests)


def test_the_limit_holds_and_the_oldest_go(tmp_path: Path) -> None:
    cache = ChunkCache(str(tmp_path), 10_000)
    for i in range(100):
        cache.write(f"{i:03d}", memoryview(bytes(500)))
        os.utime(tmp_path / f"{i:03d}", ns=(i, i))
        kept = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert kept <= 10_000 + 500
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[-1] == "099"
    assert names == [f"{i:03d}" for i in range(100 - len(names), 100)]
    assert len(names) > 10


def test_the_limit_holds_over_many_short_tasks(tmp_path: Path) -> None:
    """Each reading task has a copy of the cache of its own."""
    for i in range(100):
        ChunkCache(str(tmp_path), 10_000).write(f"{i:03d}", memoryview(bytes(500)))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000 + 500


def test_a_folder_that_cannot_be_written_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    manifest = write_latents(tmp_path / "data")
    cache = ChunkCache(str(tmp_path / "file" / "cache"), 10**9)
    with pytest.raises(ConfigError, match=r"data\.cache: .* cannot be written"):
        read_chunks(Storage(str(tmp_path / "data")), manifest, [0], cache)


def test_a_chunk_damaged_on_its_way_is_read_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_latents(tmp_path)
    storage = Storage(str(tmp_path))
    whole = read_chunks(storage, manifest, [0]).latents.tobytes()
    original, calls = Storage.read_into, []

    def flaky(self: Storage, name: str, start: int, buffer: memoryview) -> int:
        count = original(self, name, start, buffer)
        calls.append(name)
        if len(calls) == 1:
            buffer[100] = buffer[100] ^ 1
        return count

    monkeypatch.setattr(Storage, "read_into", flaky)
    before = reader.retried["hash"]
    assert read_chunks(storage, manifest, [0]).latents.tobytes() == whole
    assert (len(calls), reader.retried["hash"] - before) == (2, 1)


def test_scratch_is_the_same_memory() -> None:
    scratch = reader.Scratch()
    first = scratch.take(100)
    assert np.shares_memory(first, scratch.take(50))
    assert len(scratch.take(200)) == 200
