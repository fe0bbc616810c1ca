"""A node's cache of chunks, in a folder of RAM or NVMe, for epochs after the first.

A file is a chunk's bytes and its name their hash, so a damaged or foreign file is found by the reader and never
used. Processes share the folder without locks: files appear whole, and a file that vanishes is a miss.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from dico_ray.config import ConfigError

_SWEEP_SHARE = 32  # the folder is measured again each time it may have grown by 1/32 of its limit
_grown: dict[
    str, int
] = {}  # bytes that this process wrote since the last sweep, by folder: a reading task lives shorter


@dataclass
class ChunkCache:
    """folder: made if absent. limit: bytes; beyond it the chunks that were not used for longest go."""

    folder: str
    limit: int

    def read_into(self, digest: str, buffer: memoryview) -> bool:
        """Fills the buffer and says so; False if the chunk is not there, or has another length."""
        path = Path(self.folder) / digest
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < len(buffer) and (count := os.preadv(file.fileno(), [buffer[done:]], done)):
                    done += count
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return done == len(buffer)

    def write(self, digest: str, data: memoryview) -> None:
        """Keeps a chunk, if the folder's limit and disk allow: on a full disk it will be read again from the store.

        Raises ConfigError for a folder that cannot be written.
        """
        folder = Path(self.folder)
        temporary = folder / f".{uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, folder / digest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(f"data.cache: {self.folder} cannot be written ({error.strerror})") from None
            temporary.unlink(missing_ok=True)
            return
        grown = _grown.get(self.folder, self.limit) + len(data)  # a new process measures at once
        if grown * _SWEEP_SHARE >= self.limit:
            self._sweep()
            grown = 0
        _grown[self.folder] = grown

    def drop(self, digest: str) -> None:
        (Path(self.folder) / digest).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes the least recently used chunks beyond the limit."""
        entries = []
        for entry in os.scandir(self.folder):
            try:
                entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            except FileNotFoundError:  # another process removed it
                continue
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit * (1 - 1 / _SWEEP_SHARE):
                return
            Path(path).unlink(missing_ok=True)
            total -= size
