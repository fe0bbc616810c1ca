from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dico_ray import metrics
from dico_ray.metrics import ClassifierConfig, ImageClassifier

CONFIG = ClassifierConfig(
    name="test net",
    description="untrained",
    num_classes=7,
    image_size=16,
    widths=(4, 6),
    kernel_size=5,
    convolutions_per_stage=1,
    accuracy="none",
)


@pytest.fixture
def model() -> ImageClassifier:
    torch.manual_seed(0)
    model = ImageClassifier(CONFIG)
    model(torch.randn(8, 3, 16, 16))  # moves the batch norms' running statistics away from their defaults
    return model.eval()


def test_shapes_and_that_logits_come_from_the_features(model: ImageClassifier) -> None:
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    features, logits = model.features(images), model(images)
    assert features.shape == (5, 6)
    assert logits.shape == (5, 7)
    assert features.min() >= 0
    torch.testing.assert_close(model.head(features), logits)


def test_a_file_gives_the_same_network_back(model: ImageClassifier, tmp_path: Path) -> None:
    metrics.save_classifier(model, tmp_path / "net.safetensors")
    loaded = metrics.load_classifier(tmp_path / "net.safetensors")
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert loaded.config == CONFIG
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(images), model(images))


def test_pixels_span_the_whole_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    signed = metrics.uint8_to_signed(pixels)
    assert signed.shape == pixels.shape
    assert signed.dtype == torch.float32
    assert signed.flatten()[[0, 255]].tolist() == [-1.0, 1.0]
    torch.testing.assert_close(signed.flatten().diff(), torch.full((255,), 2 / 255), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"uint8 .* not torch\.float32: was it converted already"):
        metrics.uint8_to_signed(signed)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 16, 8),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(3, 16, 16),
        torch.zeros(2, 3, 16, 16).byte(),
    ],
)
def test_other_images_are_refused(model: ImageClassifier, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"test net takes float images \(B, 3, 16, 16\) in \[-1, 1\]"):
        model(images)


def test_a_missing_or_foreign_file_is_explained(model: ImageClassifier, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="no classifier at"):
        metrics.load_classifier(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        metrics.load_classifier(path)
    save_file({"weight": torch.zeros(3)}, str(path))
    with pytest.raises(ValueError, match=r"says format None .* not written by save_classifier"):
        metrics.load_classifier(path)


def test_a_torn_file_is_explained(model: ImageClassifier, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    metrics.save_classifier(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        metrics.load_classifier(path)


@pytest.mark.parametrize("change", [{"num_classes": 8}, {"unknown": 1}, {"widths": [4, 6, 8]}])
def test_a_config_that_does_not_fit_is_explained(
    model: ImageClassifier, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "net.safetensors"
    metrics.save_classifier(model, path)
    config = json.dumps({**dataclasses.asdict(CONFIG), **change})
    save_file(load_file(path), str(path), metadata={"format": "dico-ray image classifier 1", "config": config})
    with pytest.raises(ValueError, match="does not fit the config in its own metadata"):
        metrics.load_classifier(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "widths not empty"),
        ({"kernel_size": 4}, "kernel_size odd"),
        ({"num_classes": 0}, "must be positive"),
        ({"image_size": 18, "widths": (4, 4, 4)}, "cannot be halved 2 times"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)  # pyright: ignore[reportArgumentType]
