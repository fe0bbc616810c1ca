"""Images read by processes beside an actor: what its own threads would read, and the same errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
import ray
import webdataset
from PIL import Image
from pyarrow import parquet
from ray.exceptions import RayActorError

from dico_ray.config import ConfigError
from dico_ray.data.generated import to_png
from dico_ray.data.image_sets import ImageSet
from dico_ray.data.images import ImageError
from dico_ray.reading import ImageReaders

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
PIXELS = np.random.default_rng(0).integers(0, 256, (90, 6, 6, 3), dtype=np.uint8)
NAMES = ("flat", "tars", "tables", "adm.npz")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSet]:
    root = tmp_path_factory.mktemp("reading")
    for name in ("flat", "tars", "tables"):
        (root / name).mkdir()
    encoded = [to_png(image) for image in PIXELS]
    with webdataset.TarWriter(str(root / "tars" / "0.tar")) as writer:
        for i, data in enumerate(encoded):
            (root / "flat" / f"{i:04d}.png").write_bytes(data)
            writer.write({"__key__": f"{i:05d}", "png": data, "cls": 0})
    parquet.write_table(pyarrow.table({"image": encoded, "label": [0] * 90}), root / "tables" / "0.parquet")
    np.savez(root / "adm.npz", PIXELS)
    return {name: ImageSet.scan(str(root / name), "evaluate.images") for name in NAMES}


@pytest.fixture(scope="module")
def readers(local_ray: None) -> ImageReaders:
    """Of an actor with 4 CPUs, and so by two processes."""
    return ImageReaders(4)


@pytest.mark.parametrize("name", NAMES)
def test_processes_read_what_threads_do_in_order(sets: dict[str, ImageSet], readers: ImageReaders, name: str) -> None:
    """Into arrays of the caller's."""
    cuts, rooms = [(5, 20), (20, 21), (21, 70), (70, 90)], list[np.ndarray]()

    def room(shape: tuple[int, ...]) -> np.ndarray:
        rooms.append(np.zeros(shape, np.uint8))
        return rooms[-1]

    for some in (readers, ImageReaders(1.9), ImageReaders(2, room)):
        for (start, stop), pixels in zip(cuts, some.batches(sets[name], cuts), strict=True):
            assert pixels.dtype == np.uint8
            assert np.array_equal(pixels, PIXELS[start:stop])
    assert [len(pixels) for pixels in rooms] == [15, 1, 49, 20]


def test_empty_row_groups_are_passed_over(tmp_path: Path, readers: ImageReaders) -> None:
    encoded = [to_png(image) for image in PIXELS]
    for i, rows in enumerate((encoded[:40], [], encoded[40:80], [], encoded[80:])):
        table = pyarrow.table({"image": pyarrow.array(rows, pyarrow.binary()), "label": pyarrow.array([0] * len(rows))})
        with parquet.ParquetWriter(tmp_path / f"{i}.parquet", table.schema) as writer:
            writer.write_table(table)
            writer.write_table(table.slice(0, 0))
    images = ImageSet.scan(str(tmp_path), "x")
    for cuts in ([(0, 90)], [(0, 40), (40, 80)], [(39, 41), (41, 90)], [(80, 90)]):
        for some in (readers, ImageReaders(1)):
            found = np.concatenate(list(some.batches(images, cuts)))
            assert np.array_equal(found, PIXELS[cuts[0][0] : cuts[-1][1]])


def test_several_threads_may_ask(sets: dict[str, ImageSet], readers: ImageReaders) -> None:
    def read(start: int) -> list[np.ndarray]:
        return list(readers.batches(sets["flat"], [(start, start + 5), (start + 5, start + 10)]))

    with ThreadPoolExecutor(3) as threads:
        found = [batch for batches in threads.map(read, range(0, 90, 10)) for batch in batches]
    assert np.array_equal(np.concatenate(found), PIXELS)


def test_more_is_read_than_is_read_ahead(tmp_path: Path) -> None:
    """By one process, of whose parts two are asked for ahead; it serves the next user when one has left early."""
    for i in range(400):
        (tmp_path / f"{i:04d}.png").write_bytes(to_png(PIXELS[i % 90]))
    (tmp_path / "0399.png").write_bytes(b"torn")
    images, readers = ImageSet.scan(str(tmp_path), "x"), ImageReaders(2)
    found = np.concatenate(list(readers.batches(images, [(0, 150), (150, 399)])))
    assert np.array_equal(found, PIXELS[np.arange(399) % 90])
    left = readers.batches(images, [(0, 20), (20, 400)])
    assert np.array_equal(next(left), PIXELS[:20])
    getattr(left, "close")()  # noqa: B009
    assert np.array_equal(next(readers.batches(images, [(7, 9)])), PIXELS[7:9])


def _processes() -> set[psutil.Process]:
    return {one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::_Reader")}


def test_they_read_elsewhere_and_use_what_their_maker_has(sets: dict[str, ImageSet]) -> None:
    before = _processes()
    readers = ImageReaders(5)
    list(readers.batches(sets["flat"], [(0, 90)]))
    assert len(_processes() - before) == 2
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


@pytest.mark.parametrize("cpus", [1, 4])
def test_a_bad_image_ends_the_batches_where_it_lies(tmp_path: Path, cpus: float) -> None:
    """Whether images lie together in a part or not: there are 32 in one."""
    for i in range(80):
        (tmp_path / f"{i:04d}.png").write_bytes(to_png(PIXELS[i])[: 60 if i == 75 else None])
    images, readers = ImageSet.scan(str(tmp_path), "evaluate.images"), ImageReaders(cpus)
    found = readers.batches(images, [(0, 20), (20, 80)])
    assert np.array_equal(next(found), PIXELS[:20])
    with pytest.raises(ImageError, match=r"^0075\.png: ") as caught:
        next(found)
    assert len(str(caught.value).splitlines()) == 1
    for i, first in ((75, 60), (79, 15)):  # the latter alone in its part
        Image.new("RGB", (9, 6)).save(tmp_path / f"{i:04d}.png")
        again = readers.batches(images, [(first, i), (i, 80)])
        with pytest.raises(
            ConfigError, match=rf"^evaluate.images: 00{i}.png is 9x6 pixels, 00{first}.png 6x6; set evaluate.image_size"
        ):
            list(again)
        (tmp_path / f"{i:04d}.png").write_bytes(to_png(PIXELS[i]))


def test_a_reader_that_died_is_told(sets: dict[str, ImageSet]) -> None:
    """The pool takes it for its actor's death, and gives the images to another."""
    before = _processes()
    readers = ImageReaders(2)
    list(readers.batches(sets["flat"], [(0, 1)]))
    (process,) = _processes() - before
    process.kill()
    with pytest.raises(RayActorError):
        list(readers.batches(sets["flat"], [(0, 1)]))
