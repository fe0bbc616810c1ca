"""Images to judge from every kind of source: the same pixels, by index."""

from __future__ import annotations

import dataclasses
import io
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from dico_ray.config import ConfigError
from dico_ray.data.image_sets import UNKNOWN, ImageSet
from dico_ray.data.images import ImageError
from dico_ray.storage import Storage

PIXELS = np.random.default_rng(0).integers(0, 256, (150, 6, 6, 3), dtype=np.uint8)
LABELS = [i // 60 for i in range(150)]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a folder by class, a flat one, a WebDataset, Parquet and an .npz."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("flat", "tars", "tables"):
        (root / name).mkdir()
    encoded = [_png(image) for image in PIXELS]
    with webdataset.TarWriter(str(root / "tars" / "0.tar")) as writer:
        for i, (data, label) in enumerate(zip(encoded, LABELS, strict=True)):
            (root / "classes" / f"c{label}").mkdir(parents=True, exist_ok=True)
            (root / "classes" / f"c{label}" / f"{i:04d}.png").write_bytes(data)
            (root / "flat" / f"{i:04d}.png").write_bytes(data)
            writer.write({"__key__": f"{i:05d}", "png": data, "cls": label})
    table = pyarrow.table({"image": encoded, "label": LABELS})
    parquet.write_table(table, root / "tables" / "0.parquet", row_group_size=40)
    np.savez(root / "adm.npz", PIXELS, np.array(LABELS))
    np.savez(root / "bare.npz", PIXELS)
    return root


@pytest.mark.parametrize("name", ["classes", "flat", "tars", "tables", "adm.npz", "bare.npz"])
def test_every_source_gives_the_same_images_by_index(root: Path, name: str) -> None:
    images = ImageSet.scan(str(root / name), "evaluate.images")
    assert images.count == 150
    assert list(images.labels) == ([UNKNOWN] * 150 if name in ("flat", "bare.npz") else LABELS)
    for start, stop in ((0, 150), (0, 1), (149, 150), (63, 66), (40, 81)):
        found = images.read(start, stop)
        assert found.dtype == np.uint8
        assert np.array_equal(found, PIXELS[start:stop])


@given(st.sampled_from(["classes", "flat", "tars", "tables", "adm.npz"]), st.integers(0, 149), st.data())
def test_batches_are_adjoining_cuts_in_order(root: Path, name: str, start: int, data: st.DataObject) -> None:
    """Into arrays of the caller's, of whatever sizes, by one thread or several."""
    images = ImageSet.scan(str(root / name), "evaluate.images")
    ends = sorted(data.draw(st.sets(st.integers(start + 1, 150), min_size=1, max_size=5)))
    cuts = list(zip([start, *ends], ends, strict=False))
    rooms: list[np.ndarray] = []

    def room(shape: tuple[int, ...]) -> np.ndarray:
        rooms.append(np.zeros(shape, np.uint8))
        return rooms[-1]

    with ThreadPoolExecutor(data.draw(st.integers(1, 4))) as threads:
        found = list(images.batches(cuts, threads, room))
    assert [id(one) for one in found] == [id(one) for one in rooms]
    for (first, last), pixels in zip(cuts, found, strict=True):
        assert np.array_equal(pixels, PIXELS[first:last])


def test_a_torn_image_ends_the_batches_where_it_lies(root: Path, tmp_path: Path) -> None:
    for i in range(40):
        data = (root / "flat" / f"{i:04d}.png").read_bytes()
        (tmp_path / f"{i:04d}.png").write_bytes(data[:60] if i == 25 else data)
    images = ImageSet.scan(str(tmp_path), "x")
    with ThreadPoolExecutor(2) as threads:
        batches = images.batches([(0, 20), (20, 40)], threads)
        assert np.array_equal(next(batches), PIXELS[:20])
        with pytest.raises(ImageError, match="0025.png"):
            next(batches)


def _watching(images: ImageSet, pixels: Callable[[ImageSet, str, bytes], np.ndarray]) -> ImageSet:
    """The same set, whose images are decoded by `pixels`."""
    kind = type("Watched", (ImageSet,), {"_pixels": pixels})
    return kind(**{field.name: getattr(images, field.name) for field in dataclasses.fields(images)})


def test_a_large_piece_is_decoded_by_several_threads_a_batch_at_a_time(tmp_path: Path) -> None:
    """A row group of 150 images, of which the last is torn, which only the last batch notices."""
    encoded = [_png(image) for image in PIXELS]
    encoded[-1] = encoded[-1][:60]
    parquet.write_table(pyarrow.table({"image": encoded, "label": LABELS}), tmp_path / "0.parquet")
    images = ImageSet.scan(str(tmp_path), "x")
    names, decode = set[str](), ImageSet._pixels

    def watched(self: ImageSet, name: str, data: bytes) -> np.ndarray:
        names.add(threading.current_thread().name)
        time.sleep(0.001)  # as long as a real one takes
        return decode(self, name, data)

    with ThreadPoolExecutor(4) as threads:
        batches = _watching(images, watched).batches([(0, 50), (50, 100), (100, 150)], threads)
        assert np.array_equal(next(batches), PIXELS[:50])
        assert np.array_equal(next(batches), PIXELS[50:100])
        with pytest.raises(ImageError, match="149"):
            next(batches)
    assert len(names) > 2  # one of them is the caller's, who looks at the first image's size


def test_what_is_not_begun_is_left_when_its_user_is_done(root: Path) -> None:
    go_on, decoded, decode = threading.Event(), list[str](), ImageSet._pixels

    def watched(self: ImageSet, name: str, data: bytes) -> np.ndarray:
        decoded.append(name)
        if len(decoded) > 2:  # the caller's look at the first image's size, and the first batch
            go_on.wait()
        return decode(self, name, data)

    images = _watching(ImageSet.scan(str(root / "flat"), "x"), watched)
    with ThreadPoolExecutor(1) as threads:
        batches = images.batches([(0, 1), (1, 150)], threads)
        next(batches)
        getattr(batches, "close")()  # noqa: B009
        go_on.set()
    assert len(decoded) <= 2 + 8  # those are read and decoded at once


@given(st.sampled_from(["classes", "flat", "tars", "tables"]), st.integers(0, 149), st.integers(1, 150), st.data())
def test_parts_for_other_processes_are_adjoining_and_read_nothing_twice(
    root: Path, name: str, start: int, size: int, data: st.DataObject
) -> None:
    images, stop = ImageSet.scan(str(root / name), "x"), data.draw(st.integers(start + 1, 150))
    parts = images.chunks(start, stop, size)
    found = [pickle.loads(pickle.dumps(part)).read(low, high) for part, low, high in parts]  # noqa: S301
    assert np.array_equal(np.concatenate(found), PIXELS[start:stop])
    assert all(high - low <= max(size, len(part.source.pieces[0].labels)) for part, low, high in parts)  # pyright: ignore
    pieces = [piece for part, *_ in parts for piece in part.source.pieces]  # pyright: ignore
    assert len(set(pieces)) == len(pieces)


def test_files_of_an_object_store_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, whose size the others have to have, by as many threads as there are."""
    storage, together = Storage("memory://at-once"), threading.Barrier(4)
    for i in range(5):
        storage.write(f"{i}.png", _png(PIXELS[i]))
    images, read = ImageSet.scan(storage.url, "x"), Storage.read

    def watched(self: Storage, name: str, *places: Any) -> bytes:
        if name != "0.png":
            together.wait(20)
        return read(self, name, *places)

    monkeypatch.setattr(Storage, "read", watched)
    try:
        assert np.array_equal(images.read(0, 5), PIXELS[:5])
    finally:
        for i in range(5):
            storage.remove(f"{i}.png")


def test_rows_that_are_gone_are_noticed(tmp_path: Path) -> None:
    encoded = [_png(image) for image in PIXELS]

    def write(count: int) -> None:
        table = pyarrow.table({"image": encoded[:count], "label": LABELS[:count]})
        parquet.write_table(table, tmp_path / "0.parquet", row_group_size=64)

    write(150)
    images = ImageSet.scan(str(tmp_path), "x")
    write(70)
    assert np.array_equal(images.read(0, 64), PIXELS[:64])
    for start in (40, 130):
        with pytest.raises(ImageError, match="changed meanwhile"):
            images.read(start, 150)


def test_the_content_hash_is_of_the_images_alone(root: Path, tmp_path: Path) -> None:
    by_class = ImageSet.scan(str(root / "classes"), "x").content_hash()
    assert ImageSet.scan(str(root / "flat"), "x").content_hash() == by_class  # the same files in the same order
    assert ImageSet.scan(str(root / "adm.npz"), "x").content_hash() == (
        ImageSet.scan(str(root / "bare.npz"), "x").content_hash()
    )
    changed = PIXELS.copy()
    changed[77, 3, 3, 1] ^= 1
    np.savez(tmp_path / "adm.npz", changed)
    assert ImageSet.scan(str(tmp_path / "adm.npz"), "x").content_hash() != (
        ImageSet.scan(str(root / "adm.npz"), "x").content_hash()
    )


def test_images_of_several_sizes_are_cropped_on_request(tmp_path: Path, root: Path) -> None:
    for i, size in enumerate(((9, 12), (12, 9))):
        (tmp_path / f"{i}.png").write_bytes(_png(np.full((*size, 3), 40 * i, np.uint8)))
    with pytest.raises(
        ConfigError, match=r"evaluate.images: 1.png is 9x12 pixels, 0.png 12x9; set evaluate.image_size"
    ):
        ImageSet.scan(str(tmp_path), "evaluate.images").read(0, 2)
    cropped = ImageSet.scan(str(tmp_path), "evaluate.images", 8).read(0, 2)
    assert cropped.shape == (2, 8, 8, 3)
    assert cropped[1].min() == cropped[1].max() == 40
    for name in ("flat", "adm.npz"):  # those that have the size already stay as they are
        assert np.array_equal(ImageSet.scan(str(root / name), "x", 6).read(3, 9), PIXELS[3:9])


def test_what_is_no_set_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate.reference: .* holds no images"):
        ImageSet.scan(str(tmp_path), "evaluate.reference")
    cases = {
        "statistics": ({"mu": np.zeros(3)}, "has no images"),
        "float": ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 is float64"),
        "grey": ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, r"images are uint8 \(N, H, W, 3\)"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match=message):
            ImageSet.scan(str(tmp_path / f"{name}.npz"), "x")
    np.savez_compressed(tmp_path / "small.npz", PIXELS)
    with pytest.raises(ConfigError, match="compressed"):
        ImageSet.scan(str(tmp_path / "small.npz"), "x")
    with pytest.raises(ConfigError, match="is not there"):
        ImageSet.scan(str(tmp_path / "none.npz"), "x")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "float.npz").read_bytes()[:200])
    with pytest.raises(ConfigError, match="not a readable .npz"):
        ImageSet.scan(str(tmp_path / "torn.npz"), "x")


def test_a_file_that_shrank_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, PIXELS)
    images = ImageSet.scan(str(path), "x")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="ends before image 150"):
        images.read(100, 150)
