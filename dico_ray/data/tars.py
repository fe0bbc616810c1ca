"""Tar archives of samples, as WebDataset has them: members of one key, next to each other, are one sample.

Walks headers with the standard library's tarfile, and refuses what it would pass over in silence: a broken header
in the middle (it takes that for the end of the archive), links, devices, sparse files, names that climb.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dico_ray.config import UserError

_MOST_HEADER_BYTES = 2**20  # of one extended header; real ones have some hundred bytes
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]+)$")


class TarError(UserError, ValueError):
    """An archive that is torn, hostile or not one of samples: names it, the offset and what is wrong."""


@dataclass(frozen=True)
class TarSample:
    """Members of one key. parts: extension -> (offset, size) of its data; [start, stop): all its bytes."""

    key: str
    parts: dict[str, tuple[int, int]]
    start: int
    stop: int


class _HeaderReader(io.RawIOBase):
    """Lets tarfile read headers only: a header that claims to be huge is refused, not read."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where

    def read(self, size: int = -1, /) -> bytes:
        if size < 0 or size > _MOST_HEADER_BYTES:
            raise TarError(f"{self._where} at byte {self._file.tell()}: an extended header of {size} bytes is refused")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def split_name(name: str, where: str) -> tuple[str, str]:
    """A member's name -> (key, extension), WebDataset's way: the extension begins at the file name's first dot.

    Raises TarError for names without one, absolute ones, and ones with '..' or control characters.
    """
    match = _NAME.match(name)
    if not match or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise TarError(f"{where}: a member is named {name[:80]!r}, not KEY.EXTENSION within the archive")
    return match[1], match[2]


def walk(file: BinaryIO, where: str) -> Iterator[TarSample]:
    """The samples of an uncompressed archive, or of a piece of one cut at a member, in order; reads headers only.

    file: seekable, positioned anywhere. where: named in errors. Raises TarError.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    current: TarSample | None = None
    seen: set[str] = set()
    for member in _members(file, where, size):
        if member.isdir():
            continue
        at = f"{where} at byte {member.offset}"
        if not member.isreg() or member.issparse():
            raise TarError(
                f"{at}: {member.name[:80]!r} is a link, device or sparse file; archives of samples have none"
            )
        key, extension = split_name(member.name, at)
        stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.offset_data + member.size > size:
            raise TarError(f"{at}: {member.name!r} should end at byte {stop}, the archive at {size}; it is cut short")
        part = {extension: (member.offset_data, member.size)}
        if current and key == current.key:
            if extension in current.parts:
                raise TarError(f"{at}: {member.name!r} is there twice")
            current = TarSample(key, current.parts | part, current.start, stop)
            continue
        if current:
            yield current
        if key in seen:
            raise TarError(f"{at}: the members of sample {key!r} are not next to each other, or it is there twice")
        seen.add(key)
        current = TarSample(key, part, member.offset, stop)
    if current:
        yield current


def _members(file: BinaryIO, where: str, size: int) -> Iterator[tarfile.TarInfo]:
    """tarfile's members, with an error for all it cannot make sense of."""
    if not size:
        return
    try:
        with tarfile.open(fileobj=_HeaderReader(file, where), mode="r:") as archive:  # pyright: ignore
            while member := archive.next():
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep every one
                yield member
            end = archive.offset  # pyright: ignore[reportAttributeAccessIssue]
    except TarError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, KeyError, IndexError) as error:
        raise TarError(f"{where}: not a readable tar archive ({error})") from None
    file.seek(min(end, size))
    while block := file.read(2**20):
        if block.count(0) != len(block):
            raise TarError(f"{where} at byte {end}: the header there is damaged, and what follows would be lost")


def walk_bytes(data: bytes, where: str) -> list[TarSample]:
    """An archive in memory -> its samples, by their places in it."""
    return list(walk(io.BytesIO(data), where))


def read_samples(data: bytes | memoryview, where: str) -> list[tuple[str, dict[str, memoryview]]]:
    """An archive, or a piece of one, in memory -> (key, extension -> content) of each sample."""
    view = memoryview(data)
    return [
        (sample.key, {kind: view[at : at + size] for kind, (at, size) in sample.parts.items()})
        for sample in walk(io.BytesIO(view), where)
    ]
