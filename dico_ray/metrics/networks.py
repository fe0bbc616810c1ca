"""Feature networks by setting: the Inception of the FID, DINOv2, or a classifier that `save_classifier` wrote."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dico_ray.config import ConfigError
from dico_ray.metrics.classifier import ImageClassifier, load_classifier, uint8_to_signed
from dico_ray.metrics.dinov2 import HUB_ID, PREFIX, Dinov2
from dico_ray.metrics.features import FeatureNetwork, Features
from dico_ray.metrics.inception import PUBLISHED, Inception, find_weights, published, read_weights, weights_hash


class ClassifierFeatures(nn.Module):
    """A classifier's penultimate features as `Features.pool`; they have neither spatial features nor an own score."""

    is_inception = False

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.name, self.hash = classifier.config.name, weights_hash(classifier)
        self.image_size: int | None = classifier.config.image_size

    def forward(self, pixels: Tensor) -> Features:
        return Features(self.classifier.features(uint8_to_signed(pixels)))


def open_classifier(path: str, setting: str) -> ImageClassifier:
    """A classifier's file. Raises ConfigError that names the setting."""
    try:
        return load_classifier(path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{setting}: {error}") from None


def open_network(where: str) -> FeatureNetwork:
    """evaluate.features -> the network, on the CPU: `.safetensors` is a classifier, all else Inception's weights.

    `dinov2` and `dinov2:FOLDER_OR_HUB_ID` are DINOv2.

    Raises ConfigError that says what is missing, and where to put it.
    """
    kind, _, which = where.partition(":")
    if kind == PREFIX:
        return Dinov2(which or HUB_ID)
    if where.endswith(".safetensors") or (where != "inception" and Path(where).suffix == ""):
        return ClassifierFeatures(open_classifier(where, "evaluate.features"))
    path = find_weights(where)
    name = PUBLISHED if published(path) else f"Inception-v3 with the weights of {path.name}"
    return Inception(read_weights(path), name)
