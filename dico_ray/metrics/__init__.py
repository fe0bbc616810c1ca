"""Numbers that say how good generated images are. Knows no Ray: workers add, one merges and computes."""

from __future__ import annotations

from dico_ray.metrics.classifier import (
    ClassifierConfig,
    ImageClassifier,
    load_classifier,
    save_classifier,
    uint8_to_signed,
)
from dico_ray.metrics.features import FeatureNetwork, Features, Statistics
from dico_ray.metrics.inception import Inception
from dico_ray.metrics.networks import ClassifierFeatures, open_classifier, open_network
from dico_ray.metrics.reference import Reference
from dico_ray.metrics.scores import inception_score, precision_recall
from dico_ray.metrics.stats import Moments, frechet_distance

__all__ = [
    "ClassifierConfig",
    "ClassifierFeatures",
    "FeatureNetwork",
    "Features",
    "ImageClassifier",
    "Inception",
    "Moments",
    "Reference",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "load_classifier",
    "open_classifier",
    "open_network",
    "precision_recall",
    "save_classifier",
    "uint8_to_signed",
]
