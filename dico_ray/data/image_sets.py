"""A set of images to judge, by index: folders (with or without classes), WebDatasets, Parquet, ADM's .npz."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import xxhash

from dico_ray.config import ConfigError
from dico_ray.data.archives import NpzImages, open_npz
from dico_ray.data.images import SUFFIXES, center_crop, load_image
from dico_ray.data.sources import ImageSource, Piece
from dico_ray.storage import Storage

UNKNOWN = -1
_THREADS = 8
_HASHED_AT_ONCE = 2**26


@dataclass(frozen=True)
class ImageSet:
    """Image i is the i-th of the pieces' images, or of the .npz. labels[i] is the number of a class, or UNKNOWN.

    image_size: centre-crop and scale to it, ADM's way; None: as they are, all of one size.
    """

    setting: str
    storage: Storage
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    source: ImageSource | NpzImages
    ends: tuple[int, ...]
    image_size: int | None = None

    @property
    def count(self) -> int:
        return len(self.labels)

    @classmethod
    def scan(cls, url: str, setting: str, image_size: int | None = None) -> ImageSet:
        """What lies at a path or URL. Raises ConfigError, naming the setting, if there are no images."""
        if url.endswith(".npz"):
            folder, _, name = url.rpartition("/")
            storage = Storage(folder)
            images, labels = open_npz(storage, name, setting)
            if images is None:
                raise ConfigError(f"{setting}: {url} has no images (arr_0); name another file")
            numbers = (UNKNOWN,) * images.shape[0]
            if labels is not None and labels.shape == (images.shape[0],):
                numbers = tuple(int(label) for label in labels)
            classes = tuple(str(i) for i in range(max(numbers) + 1))
            return cls(setting, storage, numbers, classes, images, (images.shape[0],), image_size)
        storage = Storage(url)
        source = _scan(storage, setting)
        labels = tuple(label for piece in source.pieces for label in piece.labels)
        ends = tuple(accumulate(len(piece.labels) for piece in source.pieces))
        return cls(setting, storage, labels, source.classes, source, ends, image_size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images [start, stop): uint8 (n, H, W, 3), n > 0.

        Raises ImageError for one that cannot be decoded, ConfigError for images of several sizes.
        """
        if isinstance(self.source, NpzImages):
            names = [f"{self.source.name}[{i}]" for i in range(start, stop)]
            return self._stack(names, list(self.source.read(self.storage, start, stop)))
        first, last = bisect_right(self.ends, start), bisect_right(self.ends, stop - 1)
        pieces = self.source.pieces[first : last + 1]
        offset = self.ends[first] - len(pieces[0].labels)
        with ThreadPoolExecutor(_THREADS) as pool:
            named = [image for part in pool.map(self._encoded, pieces) for image in part][
                start - offset : stop - offset
            ]
            images = list(pool.map(lambda one: load_image(one[1], one[0]), named))
        names = [name for name, _ in named]
        if self.image_size is not None:
            return np.stack([center_crop(image, self.image_size) for image in images])
        return self._stack(names, [np.asarray(image) for image in images])

    def _encoded(self, piece: Piece) -> list[tuple[str, bytes]]:
        assert isinstance(self.source, ImageSource)
        return self.source.read(self.storage, piece)

    def _stack(self, names: Sequence[str], images: Sequence[np.ndarray]) -> np.ndarray:
        if self.image_size is not None:
            from PIL import Image

            images = [center_crop(Image.fromarray(image), self.image_size) for image in images]
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise ConfigError(
                    f"{self.setting}: {name} is {image.shape[1]}x{image.shape[0]} pixels, {names[0]} "
                    f"{images[0].shape[1]}x{images[0].shape[0]}; set evaluate.image_size, to which all are cropped"
                )
        return np.stack(images)

    def content_hash(self) -> str:
        """xxh3-128 of every image's stored bytes, in order; reads them all."""
        digest = xxhash.xxh3_128()
        if isinstance(self.source, NpzImages):
            rows = max(1, _HASHED_AT_ONCE // int(np.prod(self.source.shape[1:])))
            for start in range(0, self.count, rows):
                digest.update(self.source.read(self.storage, start, min(start + rows, self.count)).data)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                for part in pool.map(self._piece_hash, self.source.pieces):
                    digest.update(part)
        return digest.hexdigest()

    def _piece_hash(self, piece: Piece) -> bytes:
        return b"".join(xxhash.xxh3_128_digest(data) for _, data in self._encoded(piece))


def _scan(storage: Storage, setting: str) -> ImageSource:
    """As `encode` does, and a folder of images without classes, as samplers write them, too."""
    names = storage.names()
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if images and not any("/" in name for name in images) and not any(n.endswith((".tar", ".parquet")) for n in names):
        return ImageSource("folder", tuple(Piece(name, 0, 0, (UNKNOWN,)) for name in images), ())
    return ImageSource.scan(storage, setting)
