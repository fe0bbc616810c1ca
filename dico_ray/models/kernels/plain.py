"""What the kernels compute, in plain PyTorch: the definition that they are tested against, in float64.

Activations are NHWC, `(B, H, W, C)`; what modulates them is `(B, C)`, one value per image and channel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over channels without learned weights, then `x (1 + scale) + shift`: adaLN, arXiv 2212.09748.

    x `(B, H, W, C)`; shift and scale `(B, C)`, one value per image and channel.
    """
    x = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * branch` with x and branch `(B, H, W, C)` and gate `(B, C)`."""
    return x + gate[:, None, None] * branch


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise 3x3, zero padding: `(B, H, W, C)` -> the same, and the pixels' mean of its GELU, `(B, C)`.

    weight `(C, 1, 3, 3)`, bias `(C,)`. The GELU is the exact one (erf), here and everywhere.
    """
    pre = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return pre, F.gelu(pre).mean(dim=(1, 2))


def gelu_scale(pre: Tensor, scale: Tensor) -> Tensor:
    """`gelu(pre) * scale`: channel attention's weighing (arXiv 2505.11196), scale `(B, C)`."""
    return F.gelu(pre) * scale[:, None, None]
