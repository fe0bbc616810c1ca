"""Generated images as files: a folder of PNGs, WebDataset shards, or the .npz that ADM's evaluator reads.

Images have numbers, 0 to count - 1, and are stored in pieces, ranges of numbers, by many processes at the same time.
A set tells which numbers it holds, so that a run that starts anew makes only what is missing.
"""

from __future__ import annotations

import io
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dico_ray.data.tars import walk
from dico_ray.storage import Storage

IMAGES = "images"
NPZ = "images.npz"
_PIECES = "pieces"
_MTIME = 1  # the same images give the same archive
_RANGE = re.compile(r"(\d+)-(\d+)\.\w+")

Range = tuple[int, int]


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """PNG bytes -> uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def gaps(count: int, held: Iterable[Range]) -> list[Range]:
    """The ranges of [0, count) that `held`, sorted and disjoint, leaves out."""
    found, at = [], 0
    for start, stop in held:
        if start > at:
            found.append((at, min(start, count)))
        at = max(at, stop)
    return found + ([(at, count)] if at < count else [])


def _runs(numbers: Iterable[int]) -> list[Range]:
    """Sorted numbers -> the ranges that they make up."""
    runs: list[Range] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


class ImageSet(ABC):
    """A set of `count` images below a folder. classes: names by label."""

    def __init__(self, folder: Storage, classes: Sequence[str], count: int) -> None:
        self.folder, self.classes, self.count = folder, classes, count

    @abstractmethod
    def held(self) -> list[Range]:
        """The ranges of images that are stored, sorted."""

    @abstractmethod
    def read(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        """Stored images by number, uint8 (H, W, 3)."""

    @abstractmethod
    def put(self, index: int, label: int, pixels: np.ndarray) -> Any:
        """Takes one uint8 image (H, W, 3); threads may call it. What it returns is for `close`."""

    @abstractmethod
    def close(self, piece: Range, labels: Sequence[int], parts: Sequence[Any]) -> None:
        """Stores a piece of which `put` returned the parts, whole or not at all."""

    def finish(self, labels: np.ndarray) -> str:
        """Called once all images are held, with all labels. Returns where they are."""
        return f"{self.folder.url}/{IMAGES}"

    places = (IMAGES, _PIECES, NPZ)
    """What a set of any format may be found at, in its folder."""

    def clear(self) -> None:
        """Removes what an earlier set left in the folder, whatever its format."""
        for name in self.places:
            self.folder.remove(name)


class PngFolder(ImageSet):
    """images/CLASS/INDEX.png."""

    def _name(self, index: int, label: int) -> str:
        return f"{IMAGES}/{self.classes[label]}/{index:06d}.png"

    def _names(self) -> dict[int, str]:
        names = self.folder.at(IMAGES).names(".png")
        return {int(name.rpartition("/")[2].removesuffix(".png")): name for name in names}

    def held(self) -> list[Range]:
        return _runs(sorted(self._names()))

    def read(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        names, images = self._names(), self.folder.at(IMAGES)
        return {index: from_png(images.read(names[index])) for index in indices}

    def put(self, index: int, label: int, pixels: np.ndarray) -> None:
        self.folder.write(self._name(index, label), to_png(pixels))

    def close(self, piece: Range, labels: Sequence[int], parts: Sequence[None]) -> None:
        """Nothing: each image is a file of its own."""


class _Pieces(ImageSet):
    """A file for each piece, named START-STOP, STOP being the number after its last."""

    place: str
    suffix: str

    def held(self) -> list[Range]:
        return sorted(self._files())

    def _files(self) -> dict[Range, str]:
        names = self.folder.at(self.place).names(self.suffix)
        matches = {name: _RANGE.fullmatch(name) for name in names}
        return {(int(m[1]), int(m[2])): f"{self.place}/{name}" for name, m in matches.items() if m}

    def _write(self, piece: Range, data: bytes) -> None:
        self.folder.write(f"{self.place}/{piece[0]:06d}-{piece[1]:06d}{self.suffix}", data)

    def _by_file(self, indices: Iterable[int]) -> dict[Range, list[int]]:
        """Numbers by the piece that holds them."""
        wanted, files = sorted(indices), self._files()
        found = {piece: [i for i in wanted if piece[0] <= i < piece[1]] for piece in files}
        return {piece: numbers for piece, numbers in found.items() if numbers}


class TarShards(_Pieces):
    """images/START-STOP.tar: a WebDataset of INDEX.png and INDEX.cls."""

    place, suffix = IMAGES, ".tar"

    def read(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        found, files = {}, self._files()
        for piece, numbers in self._by_file(indices).items():
            name = files[piece]
            with self.folder.file(name) as file:
                spans = {int(sample.key): sample.parts["png"] for sample in walk(file, name)}
            for number in numbers:
                offset, size = spans[number]
                found[number] = from_png(self.folder.read(name, offset, offset + size))
        return found

    def put(self, index: int, label: int, pixels: np.ndarray) -> bytes:
        return to_png(pixels)

    def close(self, piece: Range, labels: Sequence[int], parts: Sequence[bytes]) -> None:
        from webdataset.writer import TarWriter

        buffer = io.BytesIO()
        writer = TarWriter(buffer, mtime=_MTIME, encoder=False)
        for index, label, png in zip(range(*piece), labels, parts, strict=True):
            writer.write({"__key__": f"{index:06d}", "png": png, "cls": str(label).encode()})
        writer.close()
        self._write(piece, buffer.getvalue())


class NpzFile(_Pieces):
    """images.npz: arr_0, uint8 (N, H, W, 3), and arr_1, int64 labels (N,), stored without compression.

    Pieces are .npy files until all are there; then they go through memory one at a time.
    """

    place, suffix = _PIECES, ".npy"

    def held(self) -> list[Range]:
        return [(0, self.count)] if self.folder.exists(NPZ) else super().held()

    def read(self, indices: Iterable[int]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        with self.folder.file(NPZ) as file, zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape = np.lib.format.read_array_header_1_0(member)[0]
            first, size = member.tell(), int(np.prod(shape[1:]))
            for index in sorted(indices):
                member.seek(first + index * size)
                found[index] = np.frombuffer(member.read(size), np.uint8).reshape(shape[1:])
        return found

    def put(self, index: int, label: int, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def close(self, piece: Range, labels: Sequence[int], parts: Sequence[np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.stack(parts))
        self._write(piece, buffer.getvalue())

    def finish(self, labels: np.ndarray) -> str:
        if not self.folder.exists(NPZ):
            with self.folder.writing(NPZ) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    self._append(member)
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                    np.save(member, labels.astype(np.int64))
        self.folder.remove(_PIECES)
        return f"{self.folder.url}/{NPZ}"

    def _append(self, member: Any) -> None:
        """All pieces as one array."""
        for piece, name in sorted(self._files().items()):
            images = np.load(io.BytesIO(self.folder.read(name)))
            if piece[0] == 0:
                shape = (self.count, *images.shape[1:])
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            member.write(images.reshape(-1).data)


_FORMATS: dict[str, type[ImageSet]] = {"png": PngFolder, "webdataset": TarShards, "npz": NpzFile}


def image_set(format: str, folder: Storage, classes: Sequence[str], count: int) -> ImageSet:
    """The set of a format that sample.format names."""
    return _FORMATS[format](folder, classes, count)
