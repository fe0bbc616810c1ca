"""Files in a local folder or an object store, through fsspec, with the three promises that the project needs:
a written file appears whole or not at all, a byte range can be read alone, and a missing thing is named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.core import url_to_fs

from dico_ray.config import ConfigError


@dataclass(frozen=True)
class Storage:
    """A folder by local path or URL (`s3://bucket/folder`). Pickles as its URL, so tasks can take it along.

    A relative local path is made absolute when the object is made: Ray's workers run in other folders.
    Raises ConfigError if the URL's protocol is unknown or its package is not installed.
    """

    url: str

    def __post_init__(self) -> None:
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(os.path.expanduser(self.url)))

    @cached_property
    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = url_to_fs(self.url, use_listings_cache=False) if "://" in self.url else url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{self.url}: {error}; for s3:// install dico-ray[s3]") from None
        return fs, root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    @property
    def is_local(self) -> bool:
        return "://" not in self.url or self.url.startswith("file://")

    def at(self, *parts: str) -> Storage:
        """The folder below this one."""
        return Storage("/".join([self.url.rstrip("/"), *parts]))

    def path(self, name: str) -> str:
        return f"{self._open[1]}/{name}"

    def exists(self, name: str) -> bool:
        return self._open[0].exists(self.path(name))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file's bytes, or those in [start, stop). Raises FileNotFoundError."""
        data = self._open[0].cat_file(self.path(name), start=start, end=stop)
        return data if isinstance(data, bytes) else data.encode()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file that other readers see whole or not at all."""
        fs, path = self._open[0], self.path(name)
        if not self.is_local:
            fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid4().hex[:8]}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def names(self, suffix: str = "") -> list[str]:
        """Sorted paths of all files below, relative to this folder. An absent folder has none."""
        fs, root = self._open
        try:
            found = fs.find(root)
        except FileNotFoundError:
            return []
        return sorted(f[len(root) + 1 :] for f in found if f.endswith(suffix) and not f.endswith(".tmp"))

    def folders(self) -> list[str]:
        """Sorted names of the folders directly below. An absent folder has none."""
        fs, root = self._open
        try:
            entries = fs.ls(root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(Path(e["name"]).name for e in entries if e["type"] == "directory")

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all in it; a missing one is no error."""
        if self.exists(name):
            self._open[0].rm(self.path(name), recursive=True)
