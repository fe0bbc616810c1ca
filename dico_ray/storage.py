"""Files in a local folder or an object store, with four promises: a written file appears whole or not at all, a
byte range can be read alone, transient failures are tried again, and what fails for good says what and why.

Object stores are reached through fsspec (s3fs, gcsfs, ...) or, by `storage.library`, through pyarrow.fs. Ours is
the only home of retries: the libraries' own are switched off, so that a time limit is one, and each is counted.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

import fsspec

from dico_ray.config import ConfigError, StorageSettings, UserError
from dico_ray.stores import (
    CREDENTIALS,
    MISSING,
    ArrowStore,
    as_bytes,
    cause,
    for_good,
    is_refusal,
    library_errors,
    list_files,
    open_store,
    put_file,
    read_into,
)

_ENVIRONMENT = "DICO_RAY_STORAGE"  # carries the settings to the processes that Ray starts
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 8.0
_BUFFER_BYTES = 2**20
_SHORT_READS = 3  # tries before a body that ends early is taken for a file that does

retried: Counter[str] = Counter()
"""Failures of this process that a repetition mended or tried to, by kind."""

T = TypeVar("T")


class StorageError(UserError):
    """The storage failed for good, or for longer than storage.retry_s: names the file, the offset and the cause."""


def configure(settings: StorageSettings) -> None:
    """Makes the settings hold in this process and those it starts."""
    os.environ[_ENVIRONMENT] = json.dumps({**settings.model_dump(), "options": settings.options})


def environment() -> dict[str, str]:
    """The variables that carry the settings to another machine's processes; none if `configure` was not called."""
    return {_ENVIRONMENT: os.environ[_ENVIRONMENT]} if _ENVIRONMENT in os.environ else {}


def _settings() -> StorageSettings:
    return StorageSettings.model_validate(json.loads(os.environ.get(_ENVIRONMENT, "{}")))


def _bare(fs: fsspec.AbstractFileSystem) -> Any:
    return fs.fs if isinstance(fs, ArrowStore) else fs


@dataclass(frozen=True)
class Storage:
    """A folder by local path or URL (`s3://bucket/folder`). Pickles as its URL, so tasks can take it along.

    A relative local path is made absolute when the object is made: Ray's workers run in other folders.
    Raises ConfigError if the URL's protocol is unknown or its package is not installed, StorageError if the
    storage fails for good; FileNotFoundError stays what it is.
    """

    url: str

    def __post_init__(self) -> None:
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(os.path.expanduser(self.url)))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    @cached_property
    def settings(self) -> StorageSettings:
        return _settings()

    @cached_property
    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return open_store(self.url, self.settings)

    @property
    def is_local(self) -> bool:
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, *parts: str) -> Storage:
        """The folder below this one."""
        return Storage("/".join([self.url.rstrip("/"), *parts]))

    @property
    def library(self) -> Any:
        """What requests go through: an fsspec file system, or pyarrow's own."""
        return _bare(self._open[0])

    def another_library(self, name: str) -> Any:
        """The same by another storage.library."""
        return _bare(open_store(self.url, self.settings.model_copy(update={"library": name}))[0])

    def for_arrow(self) -> tuple[Any, str]:
        """The folder as libraries built on pyarrow.fs take it: (file system or None for a local one, path)."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, root = self._open
        if self.is_local:
            return None, root
        return (fs.fs if isinstance(fs, ArrowStore) else PyFileSystem(FSSpecHandler(fs))), root

    def path(self, name: str) -> str:
        return f"{self._open[1]}/{name}"

    def exists(self, name: str) -> bool:
        try:  # not fsspec's own `exists`, which takes any failure for an absence
            self._retry(name, lambda fs: fs.info(self.path(name)))
        except MISSING:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self._retry(name, lambda fs: fs.info(self.path(name))["size"]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A file's bytes, or those in [start, stop): fewer only if the file ends there. Raises FileNotFoundError."""
        if stop is None and self.is_local:
            return self._retry(name, lambda fs: _read_whole(self.path(name)))[start:]
        if stop is None:
            return self._retry(name, lambda fs: as_bytes(fs.cat_file(self.path(name))))[start:]
        buffer = bytearray(max(0, stop - start))
        count = self.read_into(name, start, memoryview(buffer))
        return bytes(memoryview(buffer)[:count])

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fills `buffer` from a file's byte `start` on; how many bytes there were. Raises FileNotFoundError."""
        if self.is_local:
            return self._retry(f"{name} at byte {start}", lambda fs: _read_local(self.path(name), start, buffer))
        done = 0
        for _ in range(_SHORT_READS):  # a body that ended early is continued where it ended
            at, rest = start + done, buffer[done:]
            done += self._retry(
                f"{name} at byte {at}",
                lambda fs, at=at, rest=rest: read_into(fs, self.path(name), at, rest, self.settings),
            )
            if done >= len(buffer) or start + done >= self.size(name):
                break
            retried["short read"] += 1
        return done

    def file(self, name: str) -> BinaryIO:
        """A file to read from anywhere, through ranges of a megabyte. Raises FileNotFoundError."""
        if self.is_local:
            return open(self.path(name), "rb")
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self, name), _BUFFER_BYTES))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file that other readers see whole or not at all."""
        if not self.is_local:
            body = bytes(data)  # the libraries take nothing else
            try:
                self._retry(name, lambda fs: fs.pipe_file(self.path(name), body))
            except FileNotFoundError as error:
                raise StorageError(f"{self.url}/{name}: cannot be written, is there such a bucket? {error}") from error
            return
        try:
            _write_local(self.path(name), data)
        except OSError as error:
            raise StorageError(f"{self.path(name)}: cannot be written: {error.strerror}") from error

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write in parts, too large for memory; readers see it once the block has ended without an error.

        For an object store it is kept on the local disk until then.
        """
        mine = f"{uuid4().hex[:8]}.tmp"
        path = f"{self.path(name)}.{mine}" if self.is_local else os.path.join(tempfile.gettempdir(), mine)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if self.is_local:
                os.replace(path, self.path(name))
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        else:
            if not self.is_local:
                self._retry(name, lambda fs: put_file(fs, path, self.path(name)))
        finally:
            Path(path).unlink(missing_ok=True)

    def names(self, suffix: str = "") -> list[str]:
        """Sorted paths of all files below, relative to this folder. An absent folder has none."""
        root = self._open[1]
        try:
            found = self._retry("", lambda fs: list_files(fs, root))
        except FileNotFoundError:
            return []
        return sorted(f[len(root) + 1 :] for f in found if f.endswith(suffix) and not f.endswith(".tmp"))

    def folders(self) -> list[str]:
        """Sorted names of the folders directly below. An absent folder has none."""
        try:
            entries = self._retry("", lambda fs: fs.ls(self._open[1], detail=True))
        except FileNotFoundError:
            return []
        return sorted(Path(e["name"]).name for e in entries if e["type"] == "directory")

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all in it; a missing one is no error."""
        if self.exists(name):
            self._retry(name, lambda fs: fs.rm(self.path(name), recursive=True))

    def _retry(self, what: str, call: Callable[[fsspec.AbstractFileSystem], T]) -> T:
        """The call's result; transient failures are tried again, with growing pauses, for storage.retry_s."""
        fs = self._open[0]
        started, wait = time.monotonic(), _FIRST_WAIT_S
        transient, refused = library_errors()
        while True:
            try:
                return call(fs)
            except MISSING as error:
                if for_good(error):  # an access key that "does not exist" is no missing file
                    raise StorageError(f"{self.url}/{what}: {cause(error)}; {CREDENTIALS}") from error
                raise
            except refused as error:
                raise ConfigError(f"{self.url}: {cause(error)}; {CREDENTIALS}") from error
            except (OSError, *transient) as error:
                where = f"{self.url}/{what}".rstrip("/")
                if "NO_SUCH_BUCKET" in str(error):  # pyarrow's word for it, when it lists
                    raise FileNotFoundError(errno.ENOENT, "no such bucket", where) from error
                if for_good(error):
                    hint = f"; {CREDENTIALS}" if isinstance(error, PermissionError) or is_refusal(error) else ""
                    raise StorageError(f"{where}: {cause(error)}{hint}") from error
                if time.monotonic() - started + wait > self.settings.retry_s:
                    raise StorageError(
                        f"{where}: failed for {self.settings.retry_s:g} s (storage.retry_s), last: {cause(error)}"
                    ) from error
                retried[type(error).__name__] += 1
                time.sleep(wait * random.uniform(0.5, 1))
                wait = min(2 * wait, _LONGEST_WAIT_S)


class _RangeFile(io.RawIOBase):
    """A stored file whose reads are range reads: each is tried again by itself."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name, self._at = storage, name, 0
        self._size = storage.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._storage.read(self._name, self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _read_whole(path: str) -> bytes:
    """By four calls of the system. Each lets go of Python's lock, for which a dozen reading threads then queue: a file
    object, which makes a dozen calls, takes longer over a small image than decoding it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, left = [], os.fstat(descriptor).st_size
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_local(path: str, start: int, buffer: memoryview) -> int:
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], start + done)):
            done += count
    return done


def _write_local(path: str, data: bytes | memoryview) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
