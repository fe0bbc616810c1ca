"""Numbers that say how good generated images are. Knows no Ray: workers add, one merges and computes."""

from __future__ import annotations

from dico_ray.metrics.classifier import (
    ClassifierConfig,
    ImageClassifier,
    load_classifier,
    save_classifier,
    uint8_to_signed,
)
from dico_ray.metrics.stats import Moments, frechet_distance

__all__ = [
    "ClassifierConfig",
    "ImageClassifier",
    "Moments",
    "frechet_distance",
    "load_classifier",
    "save_classifier",
    "uint8_to_signed",
]
