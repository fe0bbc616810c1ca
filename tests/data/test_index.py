"""WebDatasets that other tools made: their manifest, and the general reading path."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray.config import Config, ConfigError
from dico_ray.data import index, info, verify
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import MANIFEST, Manifest, ShardError
from dico_ray.data.tars import TarError, read_samples
from dico_ray.settings import build
from dico_ray.storage import Storage
from tests.conftest import write_latents

CONFIG: Config = build({"encode": {"chunk_bytes": 20_000}})


def write_foreign(
    folder: Path, latents: np.ndarray, label: Callable[[int], tuple[str, Any]], kind: str = "npy", shards: int = 2
) -> None:
    """Shards as webdataset writes them by default: PAX headers, members of any size."""
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(latents)), shards)):
        with webdataset.TarWriter(str(folder / f"{number}.tar")) as writer:
            for i in part.tolist():
                name, value = label(i)
                writer.write({"__key__": f"part/{i}", kind: latents[i], name: value})


def read_all(folder: Path) -> tuple[np.ndarray, np.ndarray, Manifest]:
    storage = Storage(str(folder))
    manifest = Manifest.load(storage)
    samples = read_chunks(storage, manifest, range(len(manifest.chunks)))
    return samples.latents, samples.labels, manifest


def run_index(folder: Path) -> None:
    index.main(CONFIG, verbose=False, url=str(folder), threads=2)


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        (lambda i: ("cls", i % 3), lambda i: i % 3),
        (lambda i: ("txt", "bca"[i % 3]), lambda i: [1, 2, 0][i % 3]),
        (lambda i: ("json", {"label": i % 3, "caption": "x" * i}), lambda i: i % 3),
        (lambda i: ("meta.json", "c"), None),
    ],
    ids=["number", "name", "json", "none"],
)
@pytest.mark.parametrize("flips", [1, 2])
def test_any_webdataset_reads_as_our_own(tmp_path: Path, label: Any, wanted: Any, flips: int) -> None:
    shape = (23, 4, 8, 8) if flips == 1 else (23, 2, 4, 8, 8)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    write_foreign(tmp_path, latents, label)
    if wanted is None:
        with pytest.raises(ShardError, match="a label"):
            run_index(tmp_path)
        return
    run_index(tmp_path)
    found, labels, manifest = read_all(tmp_path)
    assert (manifest.layout, manifest.flips, manifest.count, len(manifest.classes)) == ("general", flips, 23, 3)
    assert len(manifest.chunks) > 2  # each shard in several
    assert np.array_equal(found, latents.reshape(23, flips, 4, 8, 8).astype(np.float16))
    assert labels.tolist() == [wanted(i) for i in range(23)]
    assert np.allclose(manifest.statistics["mean"], latents.mean((0, -1, -2) if flips == 1 else (0, 1, -1, -2)))
    verify.main(CONFIG, verbose=False, url=str(tmp_path), threads=2)


def test_our_own_shards_without_their_manifest_are_strided_again(tmp_path: Path) -> None:
    write_latents(tmp_path)
    before = read_all(tmp_path)
    (tmp_path / MANIFEST).unlink()
    run_index(tmp_path)
    after = read_all(tmp_path)
    assert after[2].layout == "strided"
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])


def test_info_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path)
    info.main(CONFIG, verbose=False, url=str(tmp_path))
    said = capsys.readouterr().out
    for words in ("200 3,072 bytes each", "4 x 8 x 8, plain and mirrored", "10: 0, 1, 2, 3, 4, ...", "0 images"):
        assert words in said


def damage(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def test_verify_finds_every_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path)
    verify.main(CONFIG, verbose=False, url=str(tmp_path), threads=3)
    assert "200 samples in 4 shards are what the manifest says" in capsys.readouterr().out
    damage(tmp_path / "shard-00000.tar", 70_000, b"\x5a")
    (tmp_path / "shard-00001.tar").unlink()
    whole = (tmp_path / "shard-00002.tar").read_bytes()
    (tmp_path / "shard-00002.tar").write_bytes(whole[:50_000])
    (tmp_path / "shard-00009.tar").write_bytes(whole)
    with pytest.raises(ShardError, match="damages in 200 samples"):
        verify.main(CONFIG, verbose=False, url=str(tmp_path), threads=3)
    said = capsys.readouterr().out
    for words in ("shard-00000.tar at byte 49152: 49,152 bytes whose hash", "shard-00001.tar: the shard is gone",
                  "shard-00002.tar: 50,000 bytes", "shard-00009.tar: not in the manifest"):  # fmt: skip
        assert words in said


def test_verify_finds_twins_that_the_hashes_vouch_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_latents(tmp_path)
    (tmp_path / "shard-00001.tar").write_bytes((tmp_path / "shard-00000.tar").read_bytes())
    raw = json.loads(manifest.to_json())
    raw["shards"][1]["hashes"] = raw["shards"][0]["hashes"]
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ShardError, match="damages"):
        verify.main(CONFIG, verbose=False, url=str(tmp_path), threads=1)
    assert "shard-00001.tar at byte 0: sample '000000000' is there twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("latents", "label", "says"),
    [
        (np.full((4, 4, 8, 8), np.nan, np.float32), ("cls", 0), "hold NaN"),
        (np.full((4, 4, 8, 8), 1e6, np.float32), ("cls", 0), "more than float16"),
        (np.zeros((4, 4, 8, 8), np.int64), ("cls", 0), "not floats"),
        (np.zeros((4, 8, 8), np.float32), ("cls", 0), "not floats"),
        (np.zeros((4, 3, 4, 8, 8), np.float32), ("cls", 0), "at most two flips"),
        (np.zeros((4, 4, 8, 8), np.float32), ("cls", "-4"), "-4 is no label|'-4' is no label"),
        (np.zeros((4, 4, 8, 8), np.float32), ("json", [1]), "is no label"),
    ],
    ids=["NaN", "large", "integers", "flat", "three", "negative", "list"],
)
def test_what_is_no_latent_or_label_is_refused(tmp_path: Path, latents: Any, label: Any, says: str) -> None:
    write_foreign(tmp_path, latents, lambda _: label)
    with pytest.raises(ShardError, match=says):
        run_index(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


def test_folders_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.tar files"):
        run_index(tmp_path)
    write_latents(tmp_path)
    with pytest.raises(ConfigError, match="already"):
        run_index(tmp_path)


def archive(*members: tuple[str, bytes], **changes: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (archive(("../up.npy", b"x")), "is named"),
        (archive(("/root.npy", b"x")), "is named"),
        (archive(("a/../../b.npy", b"x")), "is named"),
        (archive(("no extension", b"x")), "is named"),
        (archive(("a.npy", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (archive(("a.npy", b""), type=tarfile.CHRTYPE), "is a link, device"),
        (archive(("a.npy", b"1"), ("a.npy", b"2")), "is there twice"),
        (archive(("a.npy", b"1"), ("b.npy", b"2"), ("a.cls", b"3")), "not next to each other"),
        (archive(("a.npy", b"1"), pax_headers={"comment": "x" * 2**21}), "extended header of"),
        (archive(("a.npy", b"1" * 600), ("b.npy", b"2"))[:1500], "cut short|not a readable"),
        (b"\x1f\x8b" + bytes(1000), "not a readable tar"),
    ],
    ids=["up", "absolute", "climbing", "bare", "link", "device", "twice", "apart", "huge header", "cut", "gzip"],
)
def test_hostile_archives_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(TarError, match=says):
        read_samples(data, "x.tar")


def test_a_broken_header_in_the_middle_loses_nothing_in_silence() -> None:
    data = bytearray(archive(("a.npy", b"1"), ("b.npy", b"2"), ("c.npy", b"3")))
    data[1024 + 148] ^= 1  # the checksum of b's header
    with pytest.raises(TarError, match="at byte 1024"):
        read_samples(bytes(data), "x.tar")


_VALID = archive(("a.npy", b"1" * 200), ("a.cls", b"7"), ("b.npy", b"2" * 700), ("b.cls", b"8"))
_WHOLE = {key: {k: bytes(v) for k, v in parts.items()} for key, parts in read_samples(_VALID, "")}


@settings(deadline=None, max_examples=3000)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(_VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.one_of(st.none(), st.integers(0, len(_VALID))),
)
def test_any_damage_is_an_error_or_harmless(changes: list[tuple[int, int]], end: int | None) -> None:
    """3,000 damaged archives: the parser answers with TarError or with samples, and never with fewer in silence."""
    data = bytearray(_VALID)
    for at, value in changes:
        data[at] = value
    if end is not None:
        data = data[:end]
    try:
        found = read_samples(bytes(data), "x.tar")
    except TarError:
        return
    cut = end is not None and not any(_VALID[end:])
    assert len(found) >= len(_WHOLE) or (end is not None and not cut), "samples went missing without an error"


@settings(deadline=None, max_examples=1000)
@given(data=st.binary(max_size=2000))
def test_random_bytes_are_no_archive(data: bytes) -> None:
    with contextlib.suppress(TarError):
        assert read_samples(data, "x.tar") == []
