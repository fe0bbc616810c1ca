"""Images: a folder with one subfolder per class, decoding, and ADM's centre crop."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from dico_ray.config import ConfigError, UserError
from dico_ray.storage import Storage

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageError(UserError, ValueError):
    """An image that cannot be decoded; names it and says why."""


@dataclass(frozen=True)
class ImageFolder:
    """Paths relative to the folder, sorted; labels[i] is the place of paths[i]'s class in the sorted classes."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, storage: Storage, setting: str) -> ImageFolder:
        """Lists a folder of images by class. `setting` is named in the error if there is none.

        Raises ConfigError for a folder without images or with images outside of class folders.
        """
        paths = [p for p in storage.names() if p.lower().endswith(SUFFIXES)]
        if not paths:
            raise ConfigError(f"{setting}: {storage.url} holds no images ({', '.join(SUFFIXES)}); name their folder")
        stray = next((p for p in paths if "/" not in p), None)
        if stray:
            raise ConfigError(f"{setting}: {stray} lies outside of a class folder; put it in FOLDER/CLASS/")
        classes = sorted({p.split("/")[0] for p in paths})
        index = {name: i for i, name in enumerate(classes)}
        return cls(tuple(paths), tuple(index[p.split("/")[0]] for p in paths), tuple(classes))


def load_image(data: bytes, name: str) -> Image.Image:
    """Encoded bytes -> an RGB image. Raises ImageError for what is no image, or one that is torn."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: {error}") from None
    if image.mode.startswith(("I", "F")):  # Pillow would clip their 16 bits to white
        raise ImageError(f"{name}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest centred square, scaled to (size, size, 3) uint8.

    ADM's way (arXiv 2105.05233, its preprocessing): halve with a box filter while the short side is at least
    twice the target, then bicubic, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
