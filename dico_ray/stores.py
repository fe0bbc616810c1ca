"""The libraries that reach object stores, fsspec's packages and pyarrow.fs: how each is opened, and how each fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import deque
from functools import cache, lru_cache
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper

from dico_ray import signed
from dico_ray.config import ConfigError, StorageSettings

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
CREDENTIALS = "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or storage.anonymous and storage.options"
_SETTINGS = "see storage.endpoint (a URL, with http:// or https://) and storage.options"
_OPEN_FILES = 256  # of pyarrow's, kept because opening one asks for its size
_COPY_BYTES = 16 * 2**20
_FOR_GOOD = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG,
    errno.ENOSYS, errno.EEXIST, errno.ENOTEMPTY, errno.EMSGSIZE, errno.ELOOP,
})  # fmt: skip
#                 how pyarrow, which knows one error class, words what no repetition will mend
_ARROW_FOR_GOOD = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "EXPIRED", "UNRECOGNIZED_CLIENT", "HTTP status 403",
)  # fmt: skip


def open_store(url: str, settings: StorageSettings) -> tuple[fsspec.AbstractFileSystem, str]:
    """A URL's or a local path's file system, and the path within it.

    Raises ConfigError for an unknown protocol, a package that is not installed, or options that it does not take.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        if protocol in ("s3", "gs") and settings.library == "pyarrow":
            return _arrow(protocol, settings.model_dump_json(), json.dumps(settings.options)), url.partition("://")[
                2
            ].rstrip("/")
        fs, root = url_to_fs(url, **_fsspec_options(protocol, settings))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: {error}; for {protocol}:// install dico-ray[{protocol}]") from None
    except TypeError as error:
        raise ConfigError(f"{url}: {error}; {_SETTINGS}") from None
    if protocol == "s3":
        fs.retries = 1
        try:
            fs.connect()  # which is when s3fs looks at its options
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{url}: {error}; {_SETTINGS}") from None
    return fs, root.rstrip("/")


class ArrowStore(ArrowFSWrapper):
    """pyarrow's file system behind fsspec's verbs, with open files at hand."""

    cachable = False  # fsspec would take two stores for one

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self._idle: deque[tuple[str, Any]] = deque(maxlen=_OPEN_FILES)

    def read_into(self, path: str, start: int, buffer: memoryview) -> int:
        """Fills the buffer from byte `start` on; threads may share it, each read has a file to itself."""
        place = next((place for place in list(self._idle) if place[0] == path), None)
        try:
            self._idle.remove(place)  # pyright: ignore[reportArgumentType]
            file = place[1]  # pyright: ignore[reportOptionalSubscript]
        except ValueError:  # none is there, or another thread was faster
            file = self.fs.open_input_file(path)
        count = max(0, min(len(buffer), file.size() - start))
        if count:
            file.seek(start)
            count = file.readinto(buffer[:count])
        if count == len(buffer):  # one that ended early is opened anew: the file may have grown
            self._idle.append((path, file))
        return count


def read_into(
    fs: fsspec.AbstractFileSystem, path: str, start: int, buffer: memoryview, settings: StorageSettings
) -> int:
    """Fills the buffer from the file's byte `start` on, in one request; how many bytes there were."""
    if isinstance(fs, ArrowStore):
        return fs.read_into(path, start, buffer)
    if "s3" in fs.protocol:
        plain = signed.reader(fs, frozenset(settings.options), settings.timeout_s)
        count = plain.read_into(path, start, buffer) if plain else None
        if count is not None:
            return count
    try:
        data = as_bytes(fs.cat_file(path, start=start, end=start + len(buffer))) if len(buffer) else b""
    except OSError as error:
        if error.errno == errno.EINVAL and fs.info(path)["size"] <= start:  # S3 refuses a range beyond the end
            return 0
        raise
    buffer[: len(data)] = data
    return len(data)


def put_file(fs: fsspec.AbstractFileSystem, source: str, path: str) -> None:
    """Copies a local file into the store, in parts; it is there once all of it is."""
    if isinstance(fs, ArrowStore):  # whose wrapper would first make folders, which object stores have not
        with open(source, "rb") as file, fs.fs.open_output_stream(path) as target:
            shutil.copyfileobj(file, target, _COPY_BYTES)
    else:
        fs.put_file(source, path)


def list_files(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """All files below. Raises what the library does (pyarrow's wrapper takes every failure for an empty folder)."""
    if isinstance(fs, ArrowStore):
        from pyarrow.fs import FileSelector

        return [found.path for found in fs.fs.get_file_info(FileSelector(root, recursive=True)) if found.is_file]
    return list(fs.find(root))


@cache
def library_errors() -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """What the installed libraries raise beside OSError: (transient, for want of credentials)."""
    try:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError
    except ImportError:
        return (), ()
    return (ClientError, BotoCoreError), (NoCredentialsError, PartialCredentialsError)


def for_good(error: BaseException) -> bool:
    """Whether no repetition will mend it."""
    if isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno in _FOR_GOOD):
        return True
    return is_refusal(error)


def is_refusal(error: BaseException) -> bool:
    return any(word in str(error) for word in _ARROW_FOR_GOOD)


def cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def as_bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else data.encode()


def _fsspec_options(protocol: str, settings: StorageSettings) -> dict[str, Any]:
    """The settings in the words of the protocol's fsspec package."""
    if protocol == "file":
        return {}
    options: dict[str, Any] = {"use_listings_cache": False, **settings.options}
    if protocol == "s3":
        seconds = settings.timeout_s
        config: dict[str, Any] = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}
        config |= {} if settings.anonymous else {"signature_version": "s3v4"}  # for signed.py too
        options |= {"config_kwargs": {**config, **options.get("config_kwargs", {})}}
        options |= {"endpoint_url": settings.endpoint} if settings.endpoint else {}
        options |= {"anon": True} if settings.anonymous else {}
    if protocol == "gs":
        options |= {"endpoint_url": settings.endpoint} if settings.endpoint else {}
        options |= {"token": "anon"} if settings.anonymous else {}
    return options


@lru_cache(maxsize=16)
def _arrow(protocol: str, settings_json: str, options_json: str) -> fsspec.AbstractFileSystem:
    """The same store through pyarrow.fs (C++, no Python in its requests), once a process: it holds the connections."""
    from pyarrow import fs

    settings = StorageSettings.model_validate_json(settings_json)
    options: dict[str, Any] = json.loads(options_json)
    if protocol == "gs":
        return ArrowStore(fs.GcsFileSystem(anonymous=settings.anonymous, **options))
    names = {"key": "access_key", "secret": "secret_key", "token": "session_token"}
    options = {names.get(name, name): value for name, value in options.items()}
    endpoint = settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options |= {"endpoint_override": endpoint, "region": options.get("region", "us-east-1")}
    return ArrowStore(fs.S3FileSystem(
        anonymous=settings.anonymous, connect_timeout=settings.timeout_s, request_timeout=settings.timeout_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1), **options,
    ))  # fmt: skip
