from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from dico_ray.config import ConfigError
from dico_ray.settings import build
from dico_ray.storage import Storage


@pytest.fixture(params=["local", "file-url", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(str(tmp_path / "root"))
    elif request.param == "file-url":
        yield Storage(f"file://{tmp_path}/root")
    else:
        name = f"test-{uuid4().hex}"
        yield Storage(f"memory://{name}")
        memory = fsspec.filesystem("memory")
        if memory.exists(f"/{name}"):
            memory.rm(f"/{name}", recursive=True)


def test_what_is_written_is_read(storage: Storage) -> None:
    assert not storage.exists("a/b.bin")
    storage.write("a/b.bin", b"0123456789")
    assert storage.exists("a/b.bin")
    assert storage.read("a/b.bin") == b"0123456789"
    storage.write("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"
    storage.write("empty", b"")
    assert storage.read("empty") == b""


def test_ranges(storage: Storage) -> None:
    storage.write("x", bytes(range(100)))
    assert storage.read("x", 10, 20) == bytes(range(10, 20))
    assert storage.read("x", 0, 1) == b"\0"
    assert storage.read("x", 90, 200) == bytes(range(90, 100))  # what is there, no more
    assert storage.read("x", 5) == bytes(range(5, 100))


def test_a_missing_file_is_file_not_found(storage: Storage) -> None:
    for start, stop in ((None, None), (0, 5)):
        with pytest.raises(FileNotFoundError):
            storage.read("nothing", start, stop)


def test_names_are_all_files_below_sorted(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.folders() == []
    for name in ("b.tar", "a/2.tar", "a/1.json", "a/deep/er.tar"):
        storage.write(name, b"x")
    assert storage.names() == ["a/1.json", "a/2.tar", "a/deep/er.tar", "b.tar"]
    assert storage.names(".tar") == ["a/2.tar", "a/deep/er.tar", "b.tar"]
    assert storage.folders() == ["a"]
    assert storage.at("a").names() == ["1.json", "2.tar", "deep/er.tar"]
    assert storage.at("a", "deep").names() == ["er.tar"]
    assert storage.at("a").folders() == ["deep"]
    assert storage.at("a").read("2.tar") == b"x"


def test_a_file_written_in_parts_appears_when_it_is_whole(storage: Storage) -> None:
    with storage.writing("a/big") as file:
        file.write(b"one ")
        assert storage.names() == []
        file.write(b"two")
    assert storage.read("a/big") == b"one two"
    with pytest.raises(RuntimeError), storage.writing("a/torn") as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert storage.names() == ["a/big"]


def test_unfinished_files_are_not_listed(storage: Storage) -> None:
    storage.write("a.json", b"x")
    storage.write("a.json.12345678.tmp", b"half")
    assert storage.names() == ["a.json"]
    assert storage.names(".tmp") == []


def test_remove_takes_files_and_folders_and_minds_nothing_missing(storage: Storage) -> None:
    for name in ("a/1", "a/b/2", "c"):
        storage.write(name, b"x")
    storage.remove("c")
    assert storage.names() == ["a/1", "a/b/2"]
    storage.remove("a")
    storage.remove("a")
    assert storage.names() == []
    assert not storage.exists("a/1")


def test_pickles_as_its_url(storage: Storage) -> None:
    storage.write("x", b"1")  # opens the file system: the open one must not travel
    data = pickle.dumps(storage)
    again = pickle.loads(data)  # noqa: S301
    assert again == storage
    assert again.read("x") == b"1"
    assert len(data) < 300
    assert b"fsspec" not in data


def test_local_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for _ in range(3):
        storage.write("sub/file", b"x" * 1000)
    assert [path.name for path in tmp_path.rglob("*")] == ["sub", "file"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is cut off before the rename: the old content is still whole, and the rest is not listed."""
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def cut_off(source: str, target: str) -> None:
        assert Path(source).read_bytes() == b"new content"  # all of it is there before the name is
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        storage.write("file", b"new content")
    assert storage.read("file") == b"old"
    assert storage.names() == ["file"]


def test_relative_folders_become_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("here/../there")
    monkeypatch.chdir("/")
    storage.write("x", b"1")
    assert (tmp_path / "there" / "x").read_bytes() == b"1"
    assert Storage("~/x").url == os.path.expanduser("~/x")


def test_which_are_local(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).is_local
    assert Storage("file:///tmp/x").is_local
    assert not Storage("memory://x").is_local
    assert not Storage("s3://bucket/x").is_local


def test_folders_below(tmp_path: Path) -> None:
    assert Storage("s3://bucket/runs/").at("a", "b").url == "s3://bucket/runs/a/b"
    assert Storage(str(tmp_path)).at("a").url == str(tmp_path / "a")


def test_unknown_protocols_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://bucket/x"):
        Storage("nosuch://bucket/x").exists("y")


def test_credentials_are_not_written_to_the_config() -> None:
    config = build({"storage": {"options": {"key": "the-key", "secret": "the-secret"}, "endpoint": "http://here:1"}})
    assert config.storage.options["secret"] == "the-secret"
    text = config.to_yaml()
    assert "http://here:1" in text
    assert "the-key" not in text
    assert "the-secret" not in text
