"""DINOv2 through transformers, with random weights: the real loading code, and Pillow's scaling beside ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray import metrics
from dico_ray.config import ConfigError
from dico_ray.demo.digits import load_digits

transformers = pytest.importorskip("transformers", reason="pip install 'dico-ray[dinov2]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=224, initializer_range=0.3
    )
    folder = tmp_path_factory.mktemp("dinov2") / "small"
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def test_features_are_the_class_token_of_images_scaled_as_by_pillow(folder: Path) -> None:
    network = metrics.open_network(f"dinov2:{folder}")
    digits, _ = load_digits()
    found = network(torch.from_numpy(digits[:3]).permute(0, 3, 1, 2))
    assert (found.pool.shape, found.spatial, found.logits) == ((3, 24), None, None)
    assert (network.name, network.is_inception) == ("DINOv2 small", False)
    scaled = [np.asarray(Image.fromarray(d).resize((224, 224), Image.Resampling.BICUBIC)) for d in digits[:3]]
    pixels = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = transformers.Dinov2Model.from_pretrained(folder)
    wanted = model((pixels - mean[:, None, None]) / std[:, None, None]).pooler_output
    spread = (wanted - wanted.mean(0)).norm()
    assert spread > 0.5
    assert (found.pool - wanted).norm() < 0.1 * spread  # Pillow rounds between its two passes


def test_a_missing_or_torn_model_is_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.features: cannot load a DINOv2 from"):
        metrics.open_network(f"dinov2:{tmp_path}")
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks layernorm.weight"):
        metrics.open_network(f"dinov2:{tmp_path}")
