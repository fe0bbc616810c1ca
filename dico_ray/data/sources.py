"""Where images to encode come from: folders by class, WebDatasets, Parquet files; on any file system.

A source is cut into pieces that are read at once: a file, a run of an archive's samples, a row group. Their order
and content follow from the files alone, so a shuffle of pieces by seed gives the same shards on any pool.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from dico_ray.config import ConfigError
from dico_ray.data.images import SUFFIXES, ImageError, ImageFolder
from dico_ray.data.reader import LABEL_KINDS, label_of
from dico_ray.data.tars import read_samples, walk
from dico_ray.storage import Storage

_RUN = 64  # samples of an archive that are read at once: some MB
_THREADS = 8
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "class")


@dataclass(frozen=True)
class Piece:
    """Images that lie together. [start, stop): bytes of an archive, rows of a Parquet file; unused for a folder's."""

    file: str
    start: int
    stop: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ImageSource:
    """kind: folder, tars or parquet. columns: a Parquet file's image column, and whether it is a struct of bytes."""

    kind: str
    pieces: tuple[Piece, ...]
    classes: tuple[str, ...]
    columns: tuple[str, bool] = ("", False)

    @property
    def count(self) -> int:
        return sum(len(piece.labels) for piece in self.pieces)

    @classmethod
    def scan(cls, storage: Storage, setting: str) -> ImageSource:
        """Finds out what lies in a folder: .parquet files, .tar files, or else images by class.

        Reads archives' headers and labels, Parquet files' footers and label columns. `setting` is named in errors.
        Raises ConfigError for a folder of none of these, TarError or ShardError for damaged ones.
        """
        tables, archives = storage.names(".parquet"), storage.names(".tar")
        if tables and archives:
            raise ConfigError(f"{setting}: {storage.url} holds .parquet and .tar files; name a folder of one kind")
        if tables:
            return _scan_parquet(storage, tables, setting)
        if archives:
            return _scan_tars(storage, archives, setting)
        folder = ImageFolder.scan(storage, setting)
        pieces = (Piece(path, 0, 0, (label,)) for path, label in zip(folder.paths, folder.labels, strict=True))
        return cls("folder", tuple(pieces), folder.classes)

    def read(self, storage: Storage, piece: Piece) -> list[tuple[str, bytes]]:
        """(name, encoded image) of each of a piece's images. Raises ImageError for a file that changed."""
        if self.kind == "folder":
            return [(piece.file, storage.read(piece.file))]
        if self.kind == "parquet":
            return self._read_rows(storage, piece)
        data = storage.read(piece.file, piece.start, piece.stop)
        found = [
            (f"{piece.file}:{key}", bytes(parts[_image_kind(parts)]))
            for key, parts in read_samples(data, f"{storage.url}/{piece.file} at byte {piece.start}")
        ]
        if len(found) != len(piece.labels):
            raise ImageError(f"{piece.file}: {len(found)} images where {len(piece.labels)} were; it changed meanwhile")
        return found

    def _read_rows(self, storage: Storage, piece: Piece) -> list[tuple[str, bytes]]:
        column, nested = self.columns
        with storage.file(piece.file) as file:
            table = _parquet(file, piece.file)
            found = (
                (g, at) for g, (at, rows) in enumerate(_groups(table)) if at <= piece.start and piece.stop <= at + rows
            )
            group, first = next(found, (None, 0))
            if group is None:
                raise ImageError(f"{piece.file}: rows {piece.start} to {piece.stop} are gone; it changed meanwhile")
            values = table.read_row_group(group, [f"{column}.bytes" if nested else column]).column(column).to_pylist()
        rows = values[piece.start - first : piece.stop - first]
        images = [(row or {}).get("bytes") if nested else row for row in rows]
        return [(f"{piece.file}:{piece.start + i}", image or b"") for i, image in enumerate(images)]


def _image_kind(parts: Any) -> str:
    return next((kind for kind in parts if f".{kind.lower()}" in SUFFIXES), "")


def _scan_tars(storage: Storage, names: Sequence[str], setting: str) -> ImageSource:
    def scan(name: str) -> list[tuple[int, int, int | str]]:
        at = f"{storage.url}/{name}"
        with storage.file(name) as file:
            found = []
            for sample in walk(file, at):
                kind = next((kind for kind in LABEL_KINDS if kind in sample.parts), None)
                if kind is None or not _image_kind(sample.parts):
                    raise ConfigError(
                        f"{setting}: sample {sample.key!r} of {at} has {', '.join(sample.parts)}; an image "
                        f"({', '.join(SUFFIXES)}) and a label ({', '.join(LABEL_KINDS)}) are needed"
                    )
                place = file.tell()
                file.seek(sample.parts[kind][0])
                text = memoryview(file.read(sample.parts[kind][1]))
                file.seek(place)
                found.append((sample.start, sample.stop, label_of(text, kind, f"{at}: {sample.key}.{kind}")))
            return found

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(scan, names))
    classes, index = _classes([label for samples in found for *_, label in samples], setting)
    pieces = []
    for name, samples in zip(names, found, strict=True):
        for at in range(0, len(samples), _RUN):
            run = samples[at : at + _RUN]
            pieces.append(Piece(name, run[0][0], run[-1][1], tuple(index(label) for *_, label in run)))
    return ImageSource("tars", tuple(pieces), classes)


def _classes(labels: Sequence[Any], setting: str) -> tuple[tuple[str, ...], Any]:
    """Class names, and what turns a label into its number."""
    if not labels or len({type(label) for label in labels}) != 1:
        raise ConfigError(f"{setting}: {len(labels)} labels, of which some are numbers and some names; take one kind")
    if isinstance(labels[0], int):
        return tuple(str(i) for i in range(max(labels) + 1)), int
    names = tuple(sorted(set(labels)))
    return names, {name: i for i, name in enumerate(names)}.__getitem__


def _parquet(file: BinaryIO, name: str) -> Any:
    from pyarrow import ArrowInvalid
    from pyarrow import parquet as pq

    try:
        return pq.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{name} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from None


def _groups(table: Any) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each row group."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        yield first, rows
        first += rows


def _scan_parquet(storage: Storage, names: Sequence[str], setting: str) -> ImageSource:
    import pyarrow as pa

    columns: tuple[str, bool] | None = None
    named: tuple[str, ...] = ()
    found: list[tuple[str, int, int, list[Any]]] = []
    for name in names:
        with storage.file(name) as file:
            table = _parquet(file, name)
            schema = table.schema_arrow
            image = next((c for c in _IMAGE_COLUMNS if c in schema.names), None)
            label = next((c for c in _LABEL_COLUMNS if c in schema.names), None)
            if image is None or label is None:
                raise ConfigError(
                    f"{setting}: {name} has the columns {', '.join(schema.names)}; an image column "
                    f"({', '.join(_IMAGE_COLUMNS)}) and a label column ({', '.join(_LABEL_COLUMNS)}) are needed"
                )
            columns = image, pa.types.is_struct(schema.field(image).type)
            named = named or _class_names(schema, label)
            for group, (first, rows) in enumerate(_groups(table)):
                labels = table.read_row_group(group, [label]).column(label).to_pylist()
                found.append((name, first, rows, labels))
    assert columns
    classes, index = _classes([label for *_, labels in found for label in labels], setting)
    pieces = (
        Piece(name, first, first + rows, tuple(index(label) for label in labels)) for name, first, rows, labels in found
    )
    return ImageSource("parquet", tuple(pieces), named if len(named) >= len(classes) else classes, columns)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Names that Hugging Face's `datasets` stored in the schema, or none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(cast(list[str], features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
