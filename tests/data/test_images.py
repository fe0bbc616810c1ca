from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dico_ray.config import ConfigError
from dico_ray.data.images import SUFFIXES, ImageError, ImageFolder, center_crop, load_image
from dico_ray.storage import Storage


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_scan_sorts_paths_and_classes_and_labels_them(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a b/x.jpeg", "a b/deep/er.webp", "Z/1.bmp", "b/notes.txt", "c/only.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = ImageFolder.scan(Storage(str(tmp_path)), "encode.images")
    assert folder.paths == ("Z/1.bmp", "a b/deep/er.webp", "a b/x.jpeg", "b/10.PNG", "b/2.png")
    assert folder.classes == ("Z", "a b", "b")
    assert folder.labels == (0, 1, 1, 2, 2)
    assert ".jpg" in SUFFIXES


def test_scan_of_a_bucket() -> None:
    storage = Storage("memory://test-images")
    try:
        storage.write("dog/1.jpg", b"")
        storage.write("cat/1.jpg", b"")
        assert ImageFolder.scan(storage, "x") == ImageFolder(("cat/1.jpg", "dog/1.jpg"), (0, 1), ("cat", "dog"))
    finally:
        storage.remove("dog")
        storage.remove("cat")


def test_a_stray_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "stray.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^evaluate\.images: stray\.jpg lies outside of a class folder"):
        ImageFolder.scan(Storage(str(tmp_path)), "evaluate.images")


@pytest.mark.parametrize("below", ["", "missing", "texts"])
def test_a_folder_without_images_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_bytes(b"")
    storage = Storage(str(tmp_path / below))
    with pytest.raises(ConfigError, match=rf"^encode\.images: {storage.url} holds no images \(.*\.png.*name their"):
        ImageFolder.scan(storage, "encode.images")


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of openai/guided-diffusion, as its paper's preprocessing does it."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)  # pyright: ignore
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)  # pyright: ignore
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@settings(deadline=None, max_examples=80)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_crops_have_the_size_and_adm_s_pixels(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    pixels = center_crop(image, size)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    assert np.array_equal(pixels, adm_crop(image, size))


@pytest.mark.parametrize("width", [16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("height", [16, 33, 7])
def test_a_constant_image_stays_constant(width: int, height: int) -> None:
    pixels = center_crop(Image.new("RGB", (width, height), (10, 200, 77)), 16)
    assert pixels.shape == (16, 16, 3)
    assert (pixels == (10, 200, 77)).all()


def test_an_image_of_the_size_is_left_alone() -> None:
    image = noise(24, 24)
    assert np.array_equal(center_crop(image, 24), np.asarray(image))


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_is_kept(wide: bool) -> None:
    """32 x 96: black, white, black thirds. Halved, the white middle alone is left, in its own place."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    pixels[:16, 32:64, 2] = 0  # the upper half is yellow: up stays up
    image = Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2))
    found = center_crop(image, 16)
    found = found if wide else found.transpose(1, 0, 2)
    assert (found[:, :, :2] == 255).all()
    assert (found[:8, :, 2] == 0).all()
    assert (found[8:, :, 2] == 255).all()


def test_an_odd_margin_is_cut_once_more_at_the_far_side() -> None:
    image = noise(13, 8)
    assert np.array_equal(center_crop(image, 8), np.asarray(image)[:, 2:10])


def test_halving_averages_pairs() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    off = np.abs(center_crop(Image.fromarray(pixels), 16) - means)
    assert off.max() <= 1  # rounded once for rows and once for columns


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_torn_images_are_named(kind: str) -> None:
    data = encoded(noise(40, 30), kind)
    assert load_image(data, "whole").size == (40, 30)
    for part in (0.0, 0.05, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^cat/7\.img: .") as caught:
            load_image(data[: int(part * len(data))], "cat/7.img")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_images_are_read_or_named_and_nothing_else(kind: str) -> None:
    data, rng = encoded(noise(24, 20), kind), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        try:
            assert load_image(bytes(damaged), "x").mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(ImageError, match="page"):
        load_image(data, "page")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    gray = np.zeros((6, 8), np.uint8)
    gray[2:4, 1:5] = 255
    image = Image.fromarray(gray).convert(mode)
    found = load_image(encoded(image), "x")
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.repeat(gray[..., None], 3, 2))


def test_colours_of_a_palette_and_below_an_alpha_stay() -> None:
    pixels = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], np.uint8)
    palette = Image.fromarray(pixels).quantize(4)
    assert palette.mode == "P"
    assert np.array_equal(np.asarray(load_image(encoded(palette), "x")), np.asarray(palette.convert("RGB")))
    alpha = np.concatenate([pixels, np.full((2, 2, 1), 128, np.uint8)], axis=2)
    assert np.array_equal(np.asarray(load_image(encoded(Image.fromarray(alpha)), "x")), pixels)


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    found = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - (255, 0, 0)).max() <= 6
