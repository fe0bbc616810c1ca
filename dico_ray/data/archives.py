"""Images in ADM's .npz: `arr_0`, uint8 (N, H, W, 3), read by ranges from where it lies, never as a whole."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from dico_ray.config import ConfigError
from dico_ray.storage import Storage

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member: lengths of its name and extra field
_MOST_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class NpzImages:
    """Where the pixels begin in a file, and their shape (N, H, W, 3)."""

    name: str
    offset: int
    shape: tuple[int, int, int, int]

    def read(self, storage: Storage, start: int, stop: int) -> np.ndarray:
        """Images [start, stop): uint8 (n, H, W, 3). Raises as `read_into`."""
        pixels = np.empty((stop - start, *self.shape[1:]), np.uint8)
        self.read_into(storage, start, pixels)
        return pixels

    def read_into(self, storage: Storage, start: int, pixels: np.ndarray) -> None:
        """Images from `start` on -> contiguous uint8 (n, H, W, 3). Raises ConfigError if the file ends before."""
        flat = pixels.reshape(-1)
        offset = self.offset + start * int(np.prod(self.shape[1:]))
        if storage.read_into(self.name, offset, flat.data) < len(flat):
            raise ConfigError(
                f"{storage.url}/{self.name}: ends before image {start + len(pixels)}; copy the file again"
            )


def open_npz(storage: Storage, name: str, setting: str) -> tuple[NpzImages | None, np.ndarray | None]:
    """An .npz's images and labels (N,), each None where it has none.

    Raises ConfigError, naming the setting, for no .npz, images of another kind, or compressed ones.
    """
    where = f"{setting}: {storage.url}/{name}"
    try:
        with storage.file(name) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if IMAGES not in names:
                return None, None
            info = archive.getinfo(IMAGES)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ConfigError(f"{where}: arr_0 is compressed, and cannot be read by ranges; write it with np.savez")
            with archive.open(IMAGES) as member:
                shape, header = _header(member, where)
            file.seek(info.header_offset)
            name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            labels = None
            if LABELS in names:
                with archive.open(LABELS) as member:
                    labels = np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{where} is not there; name an .npz or a folder of images") from None
    except (zipfile.BadZipFile, ValueError, struct.error, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not a readable .npz ({error}); copy the file again") from None
    return NpzImages(name, begin + header, shape), labels


def _header(member: Any, where: str) -> tuple[tuple[int, int, int, int], int]:
    """Shape, and bytes before the pixels."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member, max_header_size=_MOST_HEADER_BYTES)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ConfigError(f"{where}: arr_0 is {dtype} {shape}; images are uint8 (N, H, W, 3)")
    return (shape[0], shape[1], shape[2], 3), member.tell()
