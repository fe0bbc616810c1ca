"""A small image classifier with two jobs: features for a Frechet distance, and judging generated images.

Inception-v3 knows nothing of 32x32 digits and is a download; a classifier trained on the data itself takes
its place wherever the images are not ImageNet's. Its file carries its own architecture and history.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_FORMAT = "dico-ray image classifier 1"


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is; stored as JSON in the metadata of its file."""

    name: str
    """Short and human-readable; goes into reports beside the numbers that it made."""
    description: str
    """What it was trained on, and for what."""
    num_classes: int
    """Length of the logits."""
    image_size: int
    """Height and width of its images, in pixels."""
    widths: tuple[int, ...]
    """Channels of each stage; the last is the number of features D."""
    kernel_size: int = 3
    """Of every convolution; odd."""
    convolutions_per_stage: int = 2
    """Convolutions before each stage halves the image."""
    accuracy: str = "not measured"
    """Share of right answers on held-out images, as text with its circumstances."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON has lists only
        numbers = (self.num_classes, self.image_size, self.kernel_size, self.convolutions_per_stage)
        if not self.widths or min(*numbers, *self.widths) < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"{self}: every number must be positive, kernel_size odd, widths not empty")
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {len(self.widths) - 1} times, once between "
                f"each two stages of widths {self.widths}: take fewer widths"
            )


class ImageClassifier(nn.Module):
    """Stages of [convolution, batch norm, ReLU], a halving between stages, the mean over space, one linear.

    Attributes:
        config: the `ClassifierConfig` it was built from.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(config.widths):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(config.convolutions_per_stage):
                # The batch norm that follows has a bias of its own.
                convolution = nn.Conv2d(channels, width, config.kernel_size, padding="same", bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), float in [-1, 1], H = W = image_size -> penultimate features (B, D), >= 0.

        Raises:
            ValueError: another shape, or whole numbers (pixels that were not converted).
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise ValueError(
                f"{self.config.name} takes float images (B, 3, {size}, {size}) in [-1, 1], not "
                f"{images.dtype} {tuple(images.shape)}: pixels in [0, 255] pass through uint8_to_signed first"
            )
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), float in [-1, 1] -> logits (B, num_classes)."""
        return self.head(self.features(images))


def uint8_to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels in [0, 255], any shape -> float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1.

    Raises:
        ValueError: the pixels are not uint8, so their range is unknown.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"expected uint8 pixels in [0, 255], not {pixels.dtype}: was it converted already?")
    return pixels.to(torch.float32) / 127.5 - 1.0


def save_classifier(model: ImageClassifier, path: str | Path) -> None:
    """Write weights and config as one safetensors file. The folder must exist."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    config = json.dumps(dataclasses.asdict(model.config))
    save_file(tensors, str(path), metadata={"format": _FORMAT, "config": config})


def load_classifier(path: str | Path) -> ImageClassifier:
    """Read a file of `save_classifier`; the model is on the CPU, in eval mode, its weights frozen.

    Raises:
        FileNotFoundError: no file there.
        ValueError: the file is no safetensors file, no classifier, or does not fit its own config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {path}: give a file that save_classifier wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): copy or make it again") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} says format {metadata.get('format')!r} in its metadata, expected {_FORMAT!r}: "
            "it was not written by save_classifier"
        )
    try:
        model = ImageClassifier(ClassifierConfig(**json.loads(metadata["config"])))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the config in its own metadata: {error}") from error
    return model.eval().requires_grad_(False)
