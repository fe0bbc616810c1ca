"""The same digits as a folder by class, as WebDatasets and as Parquet files are the same images and labels."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet as pq

from dico_ray.config import ConfigError
from dico_ray.data.shards import ShardError
from dico_ray.data.sources import ImageSource
from dico_ray.data.tars import TarError
from dico_ray.storage import Storage

NAMES = ("ant", "bee", "cat")
LABELS = [i % 3 for i in range(150)]


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), i, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(i) for i in range(150)]


def as_folder(root: Path) -> None:
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (root / NAMES[label]).mkdir(exist_ok=True)
        (root / NAMES[label] / f"{i:03d}.png").write_bytes(image)


def as_tars(root: Path, kind: str = "txt") -> None:
    label: Callable[[int], object] = {
        "txt": lambda i: NAMES[LABELS[i]], "cls": lambda i: LABELS[i], "json": lambda i: {"label": NAMES[LABELS[i]]},
    }[kind]  # fmt: skip
    for shard, part in enumerate(np.array_split(np.arange(150), 2)):
        with webdataset.TarWriter(str(root / f"{shard}.tar")) as writer:
            for i in part.tolist():
                writer.write({"__key__": f"x{i}", "png": IMAGES[i], kind: label(i)})


def as_parquet(root: Path, nested: bool = True) -> None:
    for number, part in enumerate(np.array_split(np.arange(150), 2)):
        images = [{"bytes": IMAGES[i], "path": None} if nested else IMAGES[i] for i in part]
        table = pa.table({"image": images, "label": [LABELS[i] for i in part]})
        if nested:  # as Hugging Face's datasets write it
            about = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, root / f"{number}.parquet", row_group_size=20)


@pytest.mark.parametrize(
    ("make", "classes", "pieces"),
    [
        (as_folder, NAMES, 150),
        (as_tars, NAMES, 4),
        (lambda root: as_tars(root, "cls"), ("0", "1", "2"), 4),
        (lambda root: as_tars(root, "json"), NAMES, 4),
        (as_parquet, NAMES, 8),
        (lambda root: as_parquet(root, nested=False), ("0", "1", "2"), 8),
    ],
    ids=["folder", "names", "numbers", "json", "datasets", "bytes"],
)
def test_every_kind_holds_the_same(
    tmp_path: Path, make: Callable[[Path], None], classes: tuple[str, ...], pieces: int
) -> None:
    make(tmp_path)
    storage = Storage(str(tmp_path))
    source = ImageSource.scan(storage, "encode.images")
    assert (source.count, source.classes, len(source.pieces)) == (150, classes, pieces)
    found = {}
    for piece in source.pieces:
        images = source.read(storage, piece)
        assert len(images) == len(piece.labels)
        found |= {data: label for (_, data), label in zip(images, piece.labels, strict=True)}
    assert found == dict(zip(IMAGES, LABELS, strict=True))
    names = [name for piece in source.pieces for name, _ in source.read(storage, piece)]
    assert len(set(names)) == 150  # the posterior's draw is keyed by them


def test_an_archive_through_range_reads_is_the_same(tmp_path: Path) -> None:
    as_tars(tmp_path)
    local = ImageSource.scan(Storage(str(tmp_path)), "encode.images")
    remote = Storage(f"memory://sources-{tmp_path.name}")
    for name in ("0.tar", "1.tar"):
        remote.write(name, (tmp_path / name).read_bytes())
    assert ImageSource.scan(remote, "encode.images") == local
    assert local.read(remote, local.pieces[1]) == local.read(Storage(str(tmp_path)), local.pieces[1])


def test_folders_that_are_no_source(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no images"):
        ImageSource.scan(storage, "encode.images")
    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet has the columns picture, label; an image column"):
        ImageSource.scan(storage, "encode.images")
    as_tars(tmp_path)
    with pytest.raises(ConfigError, match="of one kind"):
        ImageSource.scan(storage, "encode.images")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        ImageSource.scan(storage, "encode.images")


def test_samples_without_image_or_label_are_named(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "good", "png": IMAGES[0], "cls": 0})
        writer.write({"__key__": "bare", "png": IMAGES[0]})
    with pytest.raises(ConfigError, match=r"sample 'bare' of .*0\.tar has png; an image .* and a label"):
        ImageSource.scan(Storage(str(tmp_path)), "encode.images")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "odd", "png": IMAGES[0], "json": [1, 2]})
    with pytest.raises(ShardError, match="is no label"):
        ImageSource.scan(Storage(str(tmp_path)), "encode.images")


def test_a_torn_archive_is_found_before_anything_is_encoded(tmp_path: Path) -> None:
    as_tars(tmp_path)
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[:100_000] + b"\x07" * 512 + data[100_512:])
    with pytest.raises(TarError, match=r"1\.tar"):
        ImageSource.scan(Storage(str(tmp_path)), "encode.images")
