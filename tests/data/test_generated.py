from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import WebDataset

from dico_ray.data.generated import NPZ, ImageSet, Range, gaps, image_set
from dico_ray.storage import Storage

CLASSES = ("cat", "dog", "owl")
FORMATS = ("png", "webdataset", "npz")
COUNT = 10


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


def store(images: ImageSet, start: int, stop: int) -> None:
    labels = [i % 3 for i in range(start, stop)]
    parts = [images.put(i, i % 3, picture(i)) for i in range(start, stop)]
    images.close((start, stop), labels, parts)


def make(format: str, url: str) -> ImageSet:
    return image_set(format, Storage(url), CLASSES, COUNT)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "local" else f"memory://{tmp_path.name}/set"


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_stored_in_any_order_is_held_and_read(format: str, url: str) -> None:
    images = make(format, url)
    assert images.held() == []
    for start, stop in ((6, 10), (0, 4)):
        store(images, start, stop)
    missing = gaps(COUNT, make(format, url).held())
    assert missing == [(4, 6)]
    for start, stop in missing:
        store(images, start, stop)
    images.finish(np.arange(COUNT) % 3)
    found = make(format, url).read([7, 0, 4])
    assert all(np.array_equal(found[i], picture(i)) for i in (0, 4, 7))
    assert gaps(COUNT, make(format, url).held()) == []
    images.clear()
    assert Storage(url).names() == []


def test_png_folder_is_by_class(tmp_path: Path) -> None:
    images = make("png", str(tmp_path))
    store(images, 0, 4)
    assert Storage(str(tmp_path)).names() == [
        "images/cat/000000.png", "images/cat/000003.png", "images/dog/000001.png", "images/owl/000002.png",
    ]  # fmt: skip


def test_shards_are_read_by_the_package_webdataset(tmp_path: Path) -> None:
    images = make("webdataset", str(tmp_path))
    store(images, 0, 6)
    store(images, 6, 10)
    shards = sorted(str(p) for p in (tmp_path / "images").glob("*.tar"))
    rows = list(WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [row["cls"] for row in rows] == [i % 3 for i in range(COUNT)]
    assert all(np.array_equal(row["png"], picture(i)) for i, row in enumerate(rows))


def test_npz_is_adms_and_does_not_depend_on_the_pieces(tmp_path: Path) -> None:
    cuts: dict[str, list[Range]] = {"a": [(0, 5), (5, 10)], "b": [(7, 10), (0, 1), (1, 7)]}
    for name, pieces in cuts.items():
        images = make("npz", str(tmp_path / name))
        for start, stop in pieces:
            store(images, start, stop)
        assert images.finish(np.arange(COUNT) % 3).endswith(NPZ)
    with np.load(tmp_path / "a" / NPZ) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.stack([picture(i) for i in range(COUNT)]))
        assert archive["arr_1"].tolist() == [i % 3 for i in range(COUNT)]
    assert (tmp_path / "a" / NPZ).read_bytes() == (tmp_path / "b" / NPZ).read_bytes()
    assert Storage(str(tmp_path / "a")).names() == [NPZ]
    assert make("npz", str(tmp_path / "a")).finish(np.arange(COUNT)).endswith(NPZ)  # once more does no harm


@given(st.integers(1, 60), st.sets(st.integers(0, 59)))
def test_gaps_are_what_is_not_held(count: int, held: set[int]) -> None:
    ranges = [(i, i + 1) for i in sorted(held)]
    missing = [i for start, stop in gaps(count, ranges) for i in range(start, stop)]
    assert missing == [i for i in range(count) if i not in held]
