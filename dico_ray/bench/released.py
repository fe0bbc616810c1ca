"""The plain way to run a DiCo, as the released code does: NCHW, layer by layer, 1x1 as convolutions.

It computes with a `DiCo`'s own parameters, so that both give the same numbers, and is what the benchmarks compare with.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_ray.models import DiCo
from dico_ray.models.kernels.plain import NORM_EPS
from dico_ray.models.layers import Block, Stage


class PlainDiCo(nn.Module):
    """Same inputs, outputs and state dict (under `model.`) as the DiCo that it is given."""

    def __init__(self, model: DiCo) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x `(B, C, H, W)`, t `(B,)`, y `(B,)` -> `(B, 2C, H, W)`."""
        net = self.model
        c1, c2, c3 = net._conditions(t, y)
        skip_1 = _stage(net.encoder_level_1, _conv(x.to(net.dtype), net.x_embedder.proj), c1)
        skip_2 = _stage(net.encoder_level_2, F.pixel_unshuffle(_conv(skip_1, net.down1_2.body[0]), 2), c2)
        h = _stage(net.latent, F.pixel_unshuffle(_conv(skip_2, net.down2_3.body[0]), 2), c3)
        h = torch.cat([F.pixel_shuffle(_conv(h, net.up3_2.body[0]), 2), skip_2], dim=1)
        h = _stage(net.decoder_level_2, _conv(h, net.reduce_chan_level2), c2)
        h = torch.cat([F.pixel_shuffle(_conv(h, net.up2_1.body[0]), 2), skip_1], dim=1)
        h = _stage(net.decoder_level_1, _conv(h, net.reduce_chan_level1), c2)
        shift, scale = net.final_layer.adaLN_modulation(c2).chunk(2, dim=1)
        return _conv(_norm_modulate(h, shift, scale), net.final_layer.out_proj)


def _conv(x: Tensor, layer: nn.Module) -> Tensor:
    """Any of the network's convolutions, in NCHW."""
    conv = cast(nn.Conv2d, layer)
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=conv.groups)


def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over dimension 1 by its definition, then the modulation: x `(B, C, H, W)`."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    unit = (x - mean) / (variance + NORM_EPS).sqrt()
    return unit * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def _stage(blocks: Stage, x: Tensor, condition: Tensor) -> Tensor:
    for block in blocks:
        x = _block(cast(Block, block), x, condition)
    return x


def _block(block: Block, x: Tensor, condition: Tensor) -> Tensor:
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(condition).chunk(6, dim=1)
    h = F.gelu(_conv(_conv(_norm_modulate(x, shift_1, scale_1), block.conv1), block.conv2))
    h = h * torch.sigmoid(_conv(F.adaptive_avg_pool2d(h, 1), block.ca[1]))
    x = x + gate_1[:, :, None, None] * _conv(h, block.conv3)
    h = F.gelu(_conv(_norm_modulate(x, shift_2, scale_2), block.conv4))
    return x + gate_2[:, :, None, None] * _conv(h, block.conv5)
