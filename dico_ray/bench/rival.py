"""DiT-XL/2 (arXiv 2212.09748) by diffusers, called as a DiCo is: what the paper compares DiCo with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dico_ray.config import Model

_LAYERS, _HEADS, _HEAD_WIDTH, _PATCH = 28, 16, 72, 2


class DiT(nn.Module):
    """Latents, labels and timesteps as DiCo takes them; attention by PyTorch's fused kernels.

    layers, heads: fewer than XL's make a small one, for a CPU.
    """

    def __init__(self, model: Model, layers: int = _LAYERS, heads: int = _HEADS) -> None:
        super().__init__()
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        self.network: Any = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=_HEAD_WIDTH, in_channels=model.in_channels,
            out_channels=2 * model.in_channels, num_layers=layers, sample_size=model.latent_size, patch_size=_PATCH,
            num_embeds_ada_norm=model.num_classes,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x `(B, C, H, W)`, t `(B,)`, y `(B,)` -> `(B, 2C, H, W)`."""
        return self.network(x.to(self.network.dtype), timestep=t, class_labels=y, return_dict=False)[0]

    def compile_blocks(self) -> None:
        for block in self.network.transformer_blocks:
            block.compile(dynamic=False)


def forward_flops(model: Model) -> int:
    """Of one image's forward pass, as PyTorch counts them: products, convolution and attention."""
    with torch.device("meta"):
        network = DiT(model).eval()
        side = model.latent_size
        x, t = torch.empty(1, model.in_channels, side, side), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, t)
    return counter.get_total_flops()
