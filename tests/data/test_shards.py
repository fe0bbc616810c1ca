from __future__ import annotations

import gc
import io
import json
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import WebDataset

from dico_ray.config import ConfigError
from dico_ray.data import reader
from dico_ray.data.reader import Samples, read_chunks
from dico_ray.data.shards import MANIFEST, Manifest, ShardError, sample_bytes, write_shard
from dico_ray.storage import Storage

CLASSES = ("ant", "bee", "cat")
SHAPE = (4, 4, 8)  # channels, height, width


def draw(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[list[str], np.ndarray, list[int]]:
    """Keys, latents (N, 2, C, H, W) float16 and labels."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((count, 2, *shape)).astype(np.float16)
    return [f"{i:09d}" for i in range(count)], latents, rng.integers(0, len(CLASSES), count).tolist()


def data_set(storage: Storage, counts: Sequence[int], chunk: int, shape: tuple[int, int, int] = SHAPE) -> Manifest:
    """Writes shards of `counts` samples; shard i holds draw(counts[i], i)."""
    shards = tuple(
        write_shard(storage, f"shard-{i:05d}.tar", *draw(count, i, shape), chunk) for i, count in enumerate(counts)
    )
    return Manifest(
        shards=shards, chunk_samples=chunk, sample_bytes=sample_bytes(*shape), channels=shape[0],
        latent_size=shape[1:], classes=CLASSES, image_size=64, codec={"vae": "none", "hash": "0", "scale": 1.5},
        statistics={"mean": [0.0] * shape[0], "std": [1.0] * shape[0]}, skipped=("a.png: torn",),
    )  # fmt: skip


def vouched(storage: Storage, manifest: Manifest, data: bytes) -> Manifest:
    """Puts other bytes in the first shard and makes the manifest vouch for them: only their content is wrong."""
    shard, step = manifest.shards[0], manifest.chunk_samples * manifest.sample_bytes
    end = shard.count * manifest.sample_bytes
    hashes = tuple(xxhash.xxh3_128_hexdigest(data[at : min(at + step, end)]) for at in range(0, end, step))
    storage.write(shard.name, data)
    return replace(manifest, shards=(replace(shard, hashes=hashes), *manifest.shards[1:]))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    chunk=st.integers(1, 10),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], chunk: int, shape: tuple[int, int, int]
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("shards")))
    manifest = data_set(storage, counts, chunk, shape)
    assert sum(manifest.chunk_sizes) == manifest.count == sum(counts)
    assert len(manifest.chunks) == len(manifest.chunk_sizes)
    samples = [read_chunks(storage, manifest, [i]) for i in range(len(manifest.chunks))]
    assert [len(s.labels) for s in samples] == list(manifest.chunk_sizes)
    wanted = [draw(count, i, shape) for i, count in enumerate(counts)]
    latents = np.concatenate([s.latents for s in samples])
    assert latents.dtype == np.float16
    assert latents.tobytes() == np.concatenate([latents for _, latents, _ in wanted]).tobytes()
    assert np.concatenate([s.labels for s in samples]).tolist() == [y for _, _, labels in wanted for y in labels]


def test_any_float16_survives(storage: Storage) -> None:
    """The extremes and the subnormals too, bit by bit."""
    finite = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    latents = np.resize(finite, (62, 2, 4, 16, 8))
    assert latents.size >= finite.size
    shard = write_shard(storage, "x.tar", [str(i) for i in range(62)], latents, [0] * 62, 62)
    manifest = replace(data_set(storage, [1], 62, (4, 16, 8)), shards=(shard,))
    assert read_chunks(storage, manifest, [0]).latents.tobytes() == latents.tobytes()


def test_stock_webdataset_reads_a_shard(storage: Storage) -> None:
    keys, latents, labels = draw(7)
    write_shard(storage, "shard.tar", keys, latents, labels, 3)
    found = list(WebDataset(storage.path("shard.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == keys
    assert [sample["cls"] for sample in found] == labels
    assert all(sample["latent.npy"].dtype == np.float16 for sample in found)
    assert np.array_equal(np.stack([sample["latent.npy"] for sample in found]), latents)


@pytest.mark.parametrize("key", ["0", "k" * 80])
def test_the_archive_is_plain_ustar_with_a_constant_stride(storage: Storage, key: str) -> None:
    keys, latents, labels = draw(5)
    keys = [key[: len(key) - 1] + str(i) for i in range(5)]
    shard = write_shard(storage, "shard.tar", keys, latents, labels, 2)
    data, stride = storage.read("shard.tar"), sample_bytes(*SHAPE)
    assert shard.bytes == len(data)
    with tarfile.open(fileobj=io.BytesIO(data), format=tarfile.USTAR_FORMAT) as archive:
        members = archive.getmembers()
        assert archive.pax_headers == {}
        assert [m.name for m in members] == [f"{k}.{part}" for k in keys for part in ("cls", "latent.npy")]
        assert all(m.isreg() and m.pax_headers == {} for m in members)
        assert [m.offset for m in members] == [i * stride + at for i in range(5) for at in (0, 1024)]
        assert [m.offset_data - m.offset for m in members] == [512] * 10  # one header each, none before it
        for i, member in enumerate(members[1::2]):
            file = archive.extractfile(member)
            assert file is not None
            assert np.array_equal(np.load(io.BytesIO(file.read()), allow_pickle=False), latents[i])
    types = {data[at + 156 : at + 157] for m in members for at in (m.offset,)}
    assert types <= {b"0", b"\0"}
    assert b"PaxHeader" not in data


def test_a_shard_is_a_function_of_its_samples(storage: Storage) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(storage, name, *draw(4), 2)
    assert storage.read("a.tar") == storage.read("b.tar")


def damage(storage: Storage, at: int) -> None:
    data = bytearray(storage.read("shard-00000.tar"))
    data[at] ^= 1
    storage.write("shard-00000.tar", bytes(data))


@pytest.mark.parametrize("place", [0, 100, 512, 1024, 1536, 1700, -1])
def test_a_flipped_bit_is_found_and_named(storage: Storage, place: int) -> None:
    manifest = data_set(storage, [7], 3)
    start = 3 * manifest.sample_bytes
    damage(storage, start + place % manifest.sample_bytes)
    read_chunks(storage, manifest, [0])
    read_chunks(storage, manifest, [2])
    with pytest.raises(ShardError, match=rf"shard-00000\.tar at byte {start}: hash .* the shard was changed"):
        read_chunks(storage, manifest, [1])


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_shard_cut_short_is_found_and_named(storage: Storage, kept: int) -> None:
    manifest = data_set(storage, [7], 3)
    start, stop = 3 * manifest.sample_bytes, 6 * manifest.sample_bytes
    size = stop - 1 if kept == -1 else start + kept
    storage.write("shard-00000.tar", storage.read("shard-00000.tar")[:size])
    read_chunks(storage, manifest, [0])
    says = rf"shard-00000\.tar at byte {start}: {size - start} bytes where {stop - start} should be"
    with pytest.raises(ShardError, match=says):
        read_chunks(storage, manifest, [1])


def test_a_missing_shard_is_named(storage: Storage) -> None:
    manifest = data_set(storage, [2, 2], 2)
    storage.remove("shard-00001.tar")
    read_chunks(storage, manifest, [0])
    with pytest.raises(ShardError, match=r"shard-00001\.tar at byte 0: the shard is gone"):
        read_chunks(storage, manifest, [1])


@pytest.mark.parametrize("label", [-1, 3, 10**12])
def test_a_label_out_of_range(storage: Storage, label: int) -> None:
    keys, latents, _ = draw(4)
    manifest = data_set(storage, [4], 2)
    shard = write_shard(storage, "shard-00000.tar", keys, latents, [0, 1, label, 2], 2)
    manifest = replace(manifest, shards=(shard,))
    assert isinstance(read_chunks(storage, manifest, [0]), Samples)
    with pytest.raises(ShardError, match=rf"at byte {2 * manifest.sample_bytes}: sample 0 of the chunk: its label"):
        read_chunks(storage, manifest, [1])


def test_a_label_that_is_no_number(storage: Storage) -> None:
    manifest = data_set(storage, [2], 2)
    data = bytearray(storage.read("shard-00000.tar"))
    data[512:513] = b"x"
    manifest = vouched(storage, manifest, bytes(data))
    with pytest.raises(ShardError, match="its label is not a whole number"):
        read_chunks(storage, manifest, [0])


def test_a_sample_that_breaks_the_layout_is_named(storage: Storage) -> None:
    """A .npy header that differs from its fellows', in a shard that the manifest vouches for."""
    manifest = data_set(storage, [4], 4)
    data = bytearray(storage.read("shard-00000.tar"))
    at = 2 * manifest.sample_bytes + 1024 + 512 + 100
    data[at : at + 1] = b"."
    manifest = vouched(storage, manifest, bytes(data))
    with pytest.raises(ShardError, match=r"shard-00000\.tar at byte 0: sample 2 of the chunk breaks the fixed layout"):
        read_chunks(storage, manifest, [0])


def headed(array: np.ndarray) -> bytes:
    """The .npy header of an array, of the 128 bytes that all small ones have."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    assert len(buffer.getvalue()) == 128
    return buffer.getvalue()


def test_headers_are_read_in_many_threads() -> None:
    """Python 3.11's parser, which numpy takes for them, fails if another thread gets a turn within it."""
    heads = [headed(np.zeros((n, 4), np.float16)) for n in range(1, 200)]

    def read(_: int) -> None:
        for n, head in enumerate(heads, 1):
            assert reader.npy_header(head, "here")[0] == (n, 4)

    def give_way(*_: object) -> None:
        time.sleep(1e-4)

    threshold = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(30)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(give_way)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (headed(np.zeros((2, *SHAPE), object)), "array of object is refused"),
        (headed(np.zeros((2, *SHAPE), np.float32)), r"latents are float32 .* the manifest says float16"),
        (headed(np.asfortranarray(np.zeros((2, *SHAPE), np.float16))), "in Fortran order is refused"),
        (headed(np.zeros((3, *SHAPE), np.float16)), "the manifest says float16"),
        (headed(np.zeros(SHAPE, np.float16)), "the manifest says float16"),
        (headed(np.zeros((2, 4, 8, 4), np.float16)), "the manifest says float16"),
        (b"\x80\x04" + bytes(126), "no plain .npy array"),
        (headed(np.zeros(2, np.float16))[:10] + b"__import__('os').abort()".ljust(118), "no plain .npy array"),
    ],
    ids=["object", "float32", "fortran", "three", "flat", "transposed", "pickle", "code"],
)
def test_other_arrays_are_refused_and_nothing_is_unpickled(storage: Storage, header: bytes, says: str) -> None:
    manifest = data_set(storage, [1], 1)
    data = bytearray(storage.read("shard-00000.tar"))
    data[3 * 512 : 3 * 512 + 128] = header
    manifest = vouched(storage, manifest, bytes(data))
    with pytest.raises(ShardError, match=says):
        read_chunks(storage, manifest, [0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(storage: Storage, value: float) -> None:
    keys, latents, labels = draw(4)
    latents[2, 1, 3, 3, 7] = value
    with pytest.raises(ShardError, match=r"bad\.tar: the latents of 000000002 hold NaN or more"):
        write_shard(storage, "bad.tar", keys, latents, labels, 2)
    assert storage.names() == []


@pytest.mark.parametrize("key", ["a.b", "k" * 81, "ключ"])
def test_keys_that_do_not_fit_are_not_written(storage: Storage, key: str) -> None:
    _, latents, labels = draw(2)
    with pytest.raises(ShardError, match=r"bad\.tar: keys must differ and be 1 to 80 letters"):
        write_shard(storage, "bad.tar", ["ok", key], latents, labels, 2)
    assert storage.names() == []


def test_columns_of_different_lengths_are_refused(storage: Storage) -> None:
    keys, latents, labels = draw(3)
    with pytest.raises(ValueError, match="argument"):
        write_shard(storage, "bad.tar", keys[:2], latents, labels, 2)


def test_objects_are_not_written(storage: Storage) -> None:
    keys, latents, labels = draw(2)
    with pytest.raises((TypeError, ShardError)):
        write_shard(storage, "bad.tar", keys, latents.astype(object), labels, 2)
    assert storage.names() == []


def test_the_manifest_survives(storage: Storage) -> None:
    manifest = data_set(storage, [5, 7, 1], 3)
    storage.write(MANIFEST, manifest.to_json().encode())
    again = Manifest.load(storage)
    assert again == manifest
    assert again.hash == manifest.hash
    assert again.chunk_sizes == (3, 2, 3, 3, 1, 1)
    assert again.chunks[3] == (manifest.shards[1], 1)
    assert replace(manifest, image_size=65).hash != manifest.hash


def load_changed(storage: Storage, **changes: Any) -> Manifest:
    raw = json.loads(data_set(storage, [5], 2).to_json())
    storage.write(MANIFEST, json.dumps({k: v for k, v in (raw | changes).items() if v != "GONE"}).encode())
    return Manifest.load(storage)


def test_a_folder_without_a_manifest_is_a_wrong_setting(storage: Storage) -> None:
    with pytest.raises(ConfigError, match=r"data\.latents: .* has no manifest\.json; name a folder"):
        Manifest.load(storage)


def test_a_file_in_place_of_the_folder_is_a_wrong_setting(storage: Storage) -> None:
    storage.write("shard.tar", b"x")
    with pytest.raises(ConfigError, match=r"data\.latents"):
        Manifest.load(storage.at("shard.tar"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_manifest_that_is_no_json(storage: Storage, content: bytes) -> None:
    storage.write(MANIFEST, content)
    with pytest.raises(ShardError, match=r"manifest\.json is not JSON"):
        Manifest.load(storage)


@pytest.mark.parametrize("content", [b"[]", b"5", b"{}", b'{"format": "dico-ray-latents/0"}'])
def test_a_manifest_of_another_format(storage: Storage, content: bytes) -> None:
    storage.write(MANIFEST, content)
    with pytest.raises(ShardError, match=r"format .* this version reads 'dico-ray-latents/1'"):
        Manifest.load(storage)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": []},
        {"shards": 5},
        {"shards": [{"name": "a"}]},
        {"classes": "GONE"},
        {"chunk_samples": "GONE"},
        {"more": 1},
        {"latent_size": [4]},
        {"chunk_samples": 3},
        {"sample_bytes": 10**6},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself(storage: Storage, changes: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json") as caught:
        load_changed(storage, **changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [{"chunk_samples": 0}, {"chunk_samples": "2"}, {"sample_bytes": None}, {"latent_size": ["a", 2]}],
    ids=str,
)
def test_a_manifest_with_senseless_numbers(storage: Storage, changes: dict[str, Any]) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json"):
        load_changed(storage, **changes)


def test_other_sizes_in_the_manifest_are_found_when_reading(storage: Storage) -> None:
    manifest = data_set(storage, [4], 2)
    with pytest.raises(ShardError, match="the manifest says float16"):
        read_chunks(storage, replace(manifest, latent_size=(8, 4)), [0])
    with pytest.raises(ShardError, match="lies outside"):
        read_chunks(storage, replace(manifest, classes=("only",)), [0])


def test_through_an_object_store() -> None:
    storage = Storage("memory://test-shards")
    try:
        manifest = data_set(storage, [5], 2)
        storage.write(MANIFEST, manifest.to_json().encode())
        assert Manifest.load(storage) == manifest
        assert read_chunks(storage, manifest, [1]).labels.tolist() == draw(5)[2][2:4]
        storage.write("shard-00000.tar", storage.read("shard-00000.tar")[: manifest.sample_bytes])
        with pytest.raises(ShardError, match="cut short"):
            read_chunks(storage, manifest, [1])
        with pytest.raises(ShardError, match="cut short"):
            read_chunks(storage, manifest, [0])
        storage.remove("shard-00000.tar")
        with pytest.raises(ShardError, match="gone"):
            read_chunks(storage, manifest, [0])
    finally:
        storage.remove(MANIFEST)


def test_a_chunk_that_fails_ends_the_others_and_no_thread_stays(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    manifest = data_set(storage, [40], 1)
    damaged = bytearray(storage.read("shard-00000.tar"))
    damaged[5 * manifest.sample_bytes + 2000] ^= 1
    storage.write("shard-00000.tar", bytes(damaged))
    seen: list[int] = []

    def use(number: int, samples: reader.Samples) -> None:
        time.sleep(0.02)
        assert len(samples.labels) == 1
        seen.append(number)

    with pytest.raises(ShardError, match=rf"shard-00000\.tar at byte {5 * manifest.sample_bytes}: hash"):
        reader.each_chunk(storage, manifest, range(40), use)
    assert 5 <= len(set(seen)) < 39
    assert 5 not in seen
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    reader.each_chunk(storage, manifest, [0, 1], use)  # and the next reading is none the worse
    # As many chunks lie in memory as there are requests at a time, however many are read.
    assert len(reader._idle) <= reader._RANGE_REQUESTS
