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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs

from dico_ray.config import ConfigError, StorageSettings, UserError

_ENVIRONMENT = "DICO_RAY_STORAGE"  # carries the settings to the processes that Ray starts
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 8.0
_BUFFER_BYTES = 2**20
_SHORT_READS = 3  # tries before a body that ends early is taken for a file that does
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FOR_GOOD = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG,
    errno.ENOSYS, errno.EEXIST, errno.ENOTEMPTY, errno.EMSGSIZE, errno.ELOOP,
})  # fmt: skip
#                 how pyarrow, which knows one error class, words what no repetition will mend
_ARROW_FOR_GOOD = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "SIGNATURE",
    "EXPIRED",
    "UNRECOGNIZED_CLIENT",
    "HTTP status 403",
)

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
    def _settings(self) -> StorageSettings:
        return _settings()

    @cached_property
    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        try:
            if protocol in ("s3", "gs") and self._settings.library == "pyarrow":
                return _arrow(protocol, self._settings), self.url.partition("://")[2].rstrip("/")
            fs, root = url_to_fs(self.url, **_fsspec_options(protocol, self._settings))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{self.url}: {error}; for {protocol}:// install dico-ray[{protocol}]") from None
        except TypeError as error:
            raise ConfigError(f"{self.url}: {error}; {_SETTINGS}") from None
        if protocol == "s3":
            fs.retries = 1
            try:
                fs.connect()  # which is when s3fs looks at its options
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{self.url}: {error}; {_SETTINGS}") from None
        return fs, root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, *parts: str) -> Storage:
        """The folder below this one."""
        return Storage("/".join([self.url.rstrip("/"), *parts]))

    def path(self, name: str) -> str:
        return f"{self._open[1]}/{name}"

    def exists(self, name: str) -> bool:
        try:  # not fsspec's own `exists`, which takes any failure for an absence
            self._retry(name, lambda fs: fs.info(self.path(name)))
        except _MISSING:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self._retry(name, lambda fs: fs.info(self.path(name))["size"]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A file's bytes, or those in [start, stop): fewer only if the file ends there. Raises FileNotFoundError."""
        if stop is None:
            return self._retry(name, lambda fs: _bytes(fs.cat_file(self.path(name))))[start:]
        data = b""
        for _ in range(_SHORT_READS):  # a body that ended early is continued where it ended
            at = start + len(data)
            what = f"{name} at byte {at}"
            data += self._retry(what, lambda fs, at=at: _range(fs, self.path(name), at, stop))
            if len(data) >= stop - start or self.is_local or start + len(data) >= self.size(name):
                break
            retried["short read"] += 1
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fills `buffer` from a file's byte `start` on; how many bytes there were. Raises FileNotFoundError."""
        if not self.is_local:
            data = self.read(name, start, start + len(buffer))
            buffer[: len(data)] = data
            return len(data)
        with open(self.path(name), "rb", buffering=0) as file:
            done = 0
            while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], start + done)):
                done += count
        return done

    def file(self, name: str) -> BinaryIO:
        """A file to read from anywhere, through ranges of a megabyte. Raises FileNotFoundError."""
        if self.is_local:
            return open(self.path(name), "rb")
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self, name), _BUFFER_BYTES))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file that other readers see whole or not at all."""
        if not self.is_local:
            try:
                self._retry(name, lambda fs: fs.pipe_file(self.path(name), data))
            except FileNotFoundError as error:
                raise StorageError(f"{self.url}/{name}: cannot be written, is there such a bucket? {error}") from error
            return
        try:
            _write_local(self.path(name), data)
        except OSError as error:
            raise StorageError(f"{self.path(name)}: cannot be written: {error.strerror}") from error

    def names(self, suffix: str = "") -> list[str]:
        """Sorted paths of all files below, relative to this folder. An absent folder has none."""
        root = self._open[1]
        try:
            found = self._retry("", lambda fs: _files(fs, root))
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
        transient, refused = _library_errors()
        while True:
            try:
                return call(fs)
            except _MISSING as error:
                if _for_good(error):  # an access key that "does not exist" is no missing file
                    raise StorageError(f"{self.url}/{what}: {_cause(error)}; {_CREDENTIALS}") from error
                raise
            except refused as error:
                raise ConfigError(f"{self.url}: {_cause(error)}; {_CREDENTIALS}") from error
            except (OSError, *transient) as error:
                where = f"{self.url}/{what}".rstrip("/")
                if "NO_SUCH_BUCKET" in str(error):  # pyarrow's word for it, when it lists
                    raise FileNotFoundError(errno.ENOENT, "no such bucket", where) from error
                if _for_good(error):
                    hint = f"; {_CREDENTIALS}" if isinstance(error, PermissionError) or _is_refusal(error) else ""
                    raise StorageError(f"{where}: {_cause(error)}{hint}") from error
                if time.monotonic() - started + wait > self._settings.retry_s:
                    raise StorageError(
                        f"{where}: failed for {self._settings.retry_s:g} s (storage.retry_s), last: {_cause(error)}"
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


_SETTINGS = "see storage.endpoint (a URL, with http:// or https://) and storage.options"
_CREDENTIALS = (
    "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or storage.anonymous and storage.options"
)


def _library_errors() -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """What the installed libraries raise beside OSError: (transient, for want of credentials)."""
    try:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError
    except ImportError:
        return (), ()
    return (ClientError, BotoCoreError), (NoCredentialsError, PartialCredentialsError)


def _for_good(error: BaseException) -> bool:
    if isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno in _FOR_GOOD):
        return True
    return _is_refusal(error)


def _is_refusal(error: BaseException) -> bool:
    return any(word in str(error) for word in _ARROW_FOR_GOOD)


def _range(fs: fsspec.AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    """The file's bytes in [start, stop), fewer if it ends there; in one request, beside pyarrow's for the size."""
    if arrow := _arrow_inside(fs):  # its wrapper's own files cannot seek
        with arrow.open_input_file(path) as file:
            count = min(stop, file.size()) - start
            return file.read_at(count, start) if count > 0 else b""
    if start >= stop:
        return b""
    try:
        return _bytes(fs.cat_file(path, start=start, end=stop))
    except OSError as error:
        if error.errno == errno.EINVAL and fs.info(path)["size"] <= start:  # S3 refuses a range beyond the end
            return b""
        raise


def _files(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """All files below. Raises what the library does (pyarrow's wrapper takes every failure for an empty folder)."""
    if arrow := _arrow_inside(fs):
        from pyarrow.fs import FileSelector

        return [found.path for found in arrow.get_file_info(FileSelector(root, recursive=True)) if found.is_file]
    return list(fs.find(root))


def _arrow_inside(fs: fsspec.AbstractFileSystem) -> Any:
    """The pyarrow file system that this one wraps, if it is of that kind."""
    return getattr(fs, "fs", None) if type(fs).__name__ == "ArrowFSWrapper" else None


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else data.encode()


def _write_local(path: str, data: bytes) -> None:
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


def _fsspec_options(protocol: str, settings: StorageSettings) -> dict[str, Any]:
    """The settings in the words of the protocol's fsspec package."""
    if protocol == "file":
        return {}
    options: dict[str, Any] = {"use_listings_cache": False, **settings.options}
    if protocol == "s3":
        seconds = settings.timeout_s
        config = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}
        options |= {"config_kwargs": {**config, **options.get("config_kwargs", {})}}
        options |= {"endpoint_url": settings.endpoint} if settings.endpoint else {}
        options |= {"anon": True} if settings.anonymous else {}
    if protocol == "gs":
        options |= {"endpoint_url": settings.endpoint} if settings.endpoint else {}
        options |= {"token": "anon"} if settings.anonymous else {}
    return options


def _arrow(protocol: str, settings: StorageSettings) -> fsspec.AbstractFileSystem:
    """The same store through pyarrow.fs (C++, no Python in its requests)."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    if protocol == "gs":
        return ArrowFSWrapper(fs.GcsFileSystem(anonymous=settings.anonymous, **settings.options))
    names = {"key": "access_key", "secret": "secret_key", "token": "session_token"}
    options = {names.get(name, name): value for name, value in settings.options.items()}
    endpoint = settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options |= {"endpoint_override": endpoint, "region": options.get("region", "us-east-1")}
    return ArrowFSWrapper(fs.S3FileSystem(
        anonymous=settings.anonymous, connect_timeout=settings.timeout_s, request_timeout=settings.timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1), **options,
    ))  # fmt: skip
