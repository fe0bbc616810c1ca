"""A set of images to judge, by index: folders (with or without classes), WebDatasets, Parquet, ADM's .npz."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import xxhash
from PIL import Image

from dico_ray.config import ConfigError
from dico_ray.data.archives import NpzImages, open_npz
from dico_ray.data.images import SUFFIXES, center_crop, load_image
from dico_ray.data.sources import ImageSource, Piece
from dico_ray.storage import Storage

UNKNOWN = -1
THREADS = 8  # that read, at the least: most of a small image's time is its store's
_HASHED_AT_ONCE = 2**26
_DECODED_AT_ONCE = 8  # images: some milliseconds
_Batch = tuple[int, int, np.ndarray]  # images [start, stop), and where they go


@dataclass(frozen=True)
class _Task:
    """Images [start, stop) of some that are read together, the first of which is `first`, to their places in a batch.

    like: the name of the image whose size they have to have. done: what the batch waits for.
    """

    start: int
    stop: int
    batch: _Batch
    first: int
    like: str
    done: Future[None] = field(default_factory=Future[None])


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
        """Images [start, stop): uint8 (n, H, W, 3), n > 0. Raises as `batches`."""
        with ThreadPoolExecutor(THREADS) as threads:
            return next(self.batches([(start, stop)], threads))

    def batches(
        self,
        cuts: Sequence[tuple[int, int]],
        threads: Executor,
        room: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:
        """Images [start, stop) of each cut: uint8 (n, H, W, 3), n > 0. They are read and decoded from now on.

        cuts: each begins where the one before ends. threads: those that read. room: makes the array, of this shape,
        into which a batch is decoded; unset: NumPy does.
        Raises ImageError for one that cannot be decoded, ConfigError for images of several sizes.
        """
        source, room = self.source, room or new_pixels
        if isinstance(source, NpzImages):
            shape = source.shape[1:] if self.image_size is None else (self.image_size, self.image_size, 3)
            batches = [(start, stop, room((stop - start, *shape))) for start, stop in cuts]
            return _in_order(batches, [[threads.submit(self._fill_from_npz, source, batch)] for batch in batches])
        # A request to an object store mostly waits: each has a thread to itself.
        reads = self._reads(source, cuts[0][0], cuts[-1][1], _DECODED_AT_ONCE if self.storage.is_local else 1)
        encoded = self._encoded(reads[0][0])
        like = encoded[cuts[0][0] - reads[0][1]]  # whose size the others have to have
        shape = self._pixels(*like).shape
        batches = [(start, stop, room((stop - start, *shape))) for start, stop in cuts]
        waited_for: list[list[Future[None]]] = [[] for _ in batches]
        for i, (pieces, first, end) in enumerate(reads):
            tasks = []
            for batch, wait in zip(batches, waited_for, strict=True):
                for low in range(max(first, batch[0]), min(end, batch[1]), _DECODED_AT_ONCE):
                    tasks.append(_Task(low, min(low + _DECODED_AT_ONCE, end, batch[1]), batch, first, like[0]))
                    wait.append(tasks[-1].done)
            if i == 0:
                for task in tasks:
                    threads.submit(self._decode, encoded, task)
            else:
                threads.submit(self._serve, pieces, tasks, threads)
        return _in_order(batches, waited_for)

    def chunks(self, start: int, stop: int, size: int) -> list[tuple[ImageSet, int, int]]:
        """Images [start, stop), n > 0, in parts for other processes: (a set, its [start, stop)), in order.

        size: images of a part; those of a larger piece, which are read together, are one part. Not of an .npz.
        """
        assert isinstance(self.source, ImageSource)
        parts = []
        for pieces, first, end in self._reads(self.source, start, stop, size):
            ends = tuple(accumulate(len(piece.labels) for piece in pieces))
            source = replace(self.source, pieces=pieces, classes=())
            part = replace(self, labels=self.labels[first:end], classes=(), source=source, ends=ends)
            parts.append((part, max(start - first, 0), min(stop, end) - first))
        return parts

    def _reads(self, source: ImageSource, start: int, stop: int, size: int) -> list[tuple[tuple[Piece, ...], int, int]]:
        """What is read at once for images [start, stop): pieces, small ones together, and which images are in them."""
        reads: list[tuple[tuple[Piece, ...], int, int]] = []
        for i in range(bisect_right(self.ends, start), bisect_right(self.ends, stop - 1) + 1):
            piece, end = source.pieces[i], self.ends[i]
            first = end - len(piece.labels)
            if not piece.labels:  # an empty row group
                continue
            if reads and end - reads[-1][1] <= size:
                reads[-1] = (*reads[-1][0], piece), reads[-1][1], end
            else:
                reads.append(((piece,), first, end))
        return reads

    def _serve(self, pieces: tuple[Piece, ...], tasks: list[_Task], threads: Executor) -> None:
        """Reads pieces, and has their images decoded by whoever is free."""
        if all(task.done.cancelled() for task in tasks):
            return
        try:
            encoded = self._encoded(pieces)
        except Exception as error:  # noqa: BLE001 - it is raised where the images are waited for
            for task in tasks:
                if task.done.set_running_or_notify_cancel():
                    task.done.set_exception(error)
            return
        for task in tasks[1:]:
            threads.submit(self._decode, encoded, task)
        self._decode(encoded, tasks[0])

    def _decode(self, encoded: list[tuple[str, bytes]], task: _Task) -> None:
        if not task.done.set_running_or_notify_cancel():
            return
        try:
            first_of_batch, _, place = task.batch
            for i in range(task.start, task.stop):
                name, data = encoded[i - task.first]
                pixels = self._pixels(name, data)
                if pixels.shape != place.shape[1:]:
                    raise ConfigError(
                        f"{self.setting}: {name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, {task.like} "
                        f"{place.shape[2]}x{place.shape[1]}; set evaluate.image_size, to which all are cropped"
                    )
                place[i - first_of_batch] = pixels
        except Exception as error:  # noqa: BLE001 - it is raised where the images are waited for
            task.done.set_exception(error)
        else:
            task.done.set_result(None)

    def _fill_from_npz(self, source: NpzImages, batch: _Batch) -> None:
        start, stop, place = batch
        if place.shape[1:] == source.shape[1:]:
            source.read_into(self.storage, start, place)
            return
        assert self.image_size is not None
        for i, image in enumerate(source.read(self.storage, start, stop)):
            place[i] = center_crop(Image.fromarray(image), self.image_size)

    def _pixels(self, name: str, data: bytes) -> np.ndarray:
        image = load_image(data, name)
        return np.asarray(image) if self.image_size is None else center_crop(image, self.image_size)

    def _encoded(self, pieces: tuple[Piece, ...]) -> list[tuple[str, bytes]]:
        assert isinstance(self.source, ImageSource)
        return [image for piece in pieces for image in self.source.read(self.storage, piece)]

    def content_hash(self) -> str:
        """xxh3-128 of every image's stored bytes, in order; reads them all."""
        digest = xxhash.xxh3_128()
        if isinstance(self.source, NpzImages):
            rows = max(1, _HASHED_AT_ONCE // int(np.prod(self.source.shape[1:])))
            for start in range(0, self.count, rows):
                digest.update(self.source.read(self.storage, start, min(start + rows, self.count)).data)
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                for part in pool.map(self._piece_hash, self.source.pieces):
                    digest.update(part)
        return digest.hexdigest()

    def _piece_hash(self, piece: Piece) -> bytes:
        return b"".join(xxhash.xxh3_128_digest(data) for _, data in self._encoded((piece,)))


def new_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """Room for a batch: uint8, not yet set."""
    return np.empty(shape, np.uint8)


def _in_order(batches: list[_Batch], waited_for: list[list[Future[None]]]) -> Iterator[np.ndarray]:
    """Each batch when it is complete. What is not begun when its user, who has begun, is done is left."""
    try:
        for (*_, place), work in zip(batches, waited_for, strict=True):
            for one in work:
                one.result()
            yield place
    finally:
        for work in waited_for:
            for one in work:
                one.cancel()


def _scan(storage: Storage, setting: str) -> ImageSource:
    """As `encode` does, and a folder of images without classes, as samplers write them, too."""
    names = storage.names()
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if images and not any("/" in name for name in images) and not any(n.endswith((".tar", ".parquet")) for n in names):
        return ImageSource("folder", tuple(Piece(name, 0, 0, (UNKNOWN,)) for name in images), ())
    return ImageSource.scan(storage, setting)
