"""DINOv2's features, for a distance that follows what people see better than Inception's (arXiv 2306.04675)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dico_ray.config import ConfigError
from dico_ray.metrics.features import Features
from dico_ray.metrics.inception import weights_hash

PREFIX = "dinov2"
HUB_ID = "facebook/dinov2-large"
_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]


class Dinov2(nn.Module):
    """uint8 pixels [0, 255] (B, 3, H, W) of any size -> `Features.pool` (B, D): the class token, D = 1024 for ViT-L.

    Images are scaled to 224 pixels by an antialiased bicubic filter, as the paper's code does through Pillow.
    """

    image_size: int | None = None
    is_inception = False
    _mean: Tensor
    _std: Tensor

    def __init__(self, where: str) -> None:
        """where: a folder or hub id of a Dinov2 model. Raises ConfigError if none loads, or transformers lacks."""
        super().__init__()
        try:
            from transformers import Dinov2Model  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "evaluate.features: dinov2 comes from transformers, which is not installed; "
                "pip install 'dico-ray[dinov2]'"
            ) from None
        model: Any = Dinov2Model
        try:
            self.network, loaded = model.from_pretrained(where, output_loading_info=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"evaluate.features: cannot load a DINOv2 from {where!r}: {reason}") from None
        if loaded["missing_keys"]:  # transformers fills them with random numbers
            raise ConfigError(f"evaluate.features: {where} lacks {sorted(loaded['missing_keys'])[0]}; copy it again")
        self.network.float().eval().requires_grad_(False)
        self.name, self.hash = f"DINOv2 {where.rstrip('/').rpartition('/')[2]}", weights_hash(self.network)
        self.register_buffer("_mean", torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_STD).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Features:
        images = functional.interpolate(pixels.float(), (_SIZE, _SIZE), mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255) / 255  # Pillow's result is uint8
        tokens = self.network((images - self._mean) / self._std).last_hidden_state
        return Features(tokens[:, 0])
