"""The parts DiCo is built of (arXiv 2505.11196).

Activations lie NHWC in memory, `(B, H, W, C)` contiguous, from the entrance of the network to its exit: a 1x1
convolution is then one matrix product, a LayerNorm over channels reads whole rows, and cuDNN and oneDNN take
their channels-last kernels without a copy. Parameters keep the shapes of the released checkpoints and stay
contiguous, because DeepSpeed flattens them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_ray.models.graphs import StageGraphs
from dico_ray.models.kernels.plain import gated_residual, layer_norm_modulate

FREQUENCY_FEATURES = 256
MAX_PERIOD = 10_000.0


def pixel_unshuffle(x: Tensor) -> Tensor:
    """`(B, H, W, C)` -> `(B, H/2, W/2, 4C)`, channels in the order of `torch.nn.PixelUnshuffle(2)`."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // 2, 2, width // 2, 2, channels)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def pixel_shuffle(x: Tensor) -> Tensor:
    """`(B, H, W, 4C)` -> `(B, 2H, 2W, C)`, channels in the order of `torch.nn.PixelShuffle(2)`."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height, width, channels // 4, 2, 2)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def timestep_features(timesteps: Tensor) -> Tensor:
    """Sinusoids of the timesteps `(B,)` in [0, 1000): float32 `(B, 256)`, cosines first (arXiv 2212.09748).

    Always float32: bfloat16 cannot tell timestep 998 from 999.
    """
    half = FREQUENCY_FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Pointwise(nn.Conv2d):
    """1x1 convolution as one matrix product: `(B, H, W, C_in)` -> `(B, H, W, C_out)`.

    The weight keeps the released shape `(C_out, C_in, 1, 1)`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.view(self.out_channels, self.in_channels), self.bias)


class Conv3x3(nn.Conv2d):
    """3x3 convolution, padding 1: `(B, H, W, C_in)` -> `(B, H, W, C_out)`; depthwise if groups = C_in."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        # The permuted view of an NHWC tensor is what PyTorch calls channels_last: no bytes are moved.
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbedder(nn.Module):
    """The input convolution: latents `(B, H, W, C)` -> `(B, H, W, hidden_size)`."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = Conv3x3(in_channels, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features `(B, 256)` -> embeddings `(B, hidden_size)`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(features)


class LabelEmbedder(nn.Module):
    """Labels `(B,)` in [0, num_classes] -> one embedding for each width of the network.

    The last row of every table, `num_classes`, is the null label: no class (arXiv 2207.12598).
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table_0 = nn.Embedding(num_classes + 1, hidden_size)
        self.embedding_table_1 = nn.Embedding(num_classes + 1, 2 * hidden_size)
        self.embedding_table_2 = nn.Embedding(num_classes + 1, 4 * hidden_size)

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding_table_0(labels), self.embedding_table_1(labels), self.embedding_table_2(labels)


class GlobalMean(nn.Module):
    """Mean over the pixels: `(B, H, W, C)` -> `(B, 1, 1, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(1, 2), keepdim=True)


class Block(nn.Module):
    """One DiCo block: a convolution half and a feed-forward half, each adaLN-zero modulated and gated.

    x `(B, H, W, C)`, condition `(B, C)` -> `(B, H, W, C)`.
    fused: by the kernels of `kernels.block` instead of the layers here; keep_gelu: as there.
    """

    fused = False
    keep_gelu = False

    def __init__(self, channels: int, ffn_ratio: int) -> None:
        super().__init__()
        self.conv1 = Pointwise(channels, channels)
        self.conv2 = Conv3x3(channels, channels, groups=channels)
        self.conv3 = Pointwise(channels, channels)
        # Compact channel attention: each channel is weighed by a gate computed from the means of all of them.
        self.ca = nn.Sequential(GlobalMean(), Pointwise(channels, channels), nn.Sigmoid())
        self.conv4 = Pointwise(channels, ffn_ratio * channels)
        self.conv5 = Pointwise(ffn_ratio * channels, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)
        if self.fused:
            from dico_ray.models.kernels.block import block, block_inference

            if not torch.is_grad_enabled():
                return block_inference(x, modulation, self._weights())
            return block(x, modulation, self._weights(), self.keep_gelu)[0]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
        h = F.gelu(self.conv2(self.conv1(layer_norm_modulate(x, shift_1, scale_1))))
        x = gated_residual(x, self.conv3(h * self.ca(h)), gate_1)
        h = F.gelu(self.conv4(layer_norm_modulate(x, shift_2, scale_2)))
        return gated_residual(x, self.conv5(h), gate_2)

    def _weights(self) -> list[Tensor]:
        """In the order of `kernels.block`."""
        parts = ("conv1", "conv2", "conv3", "ca.1", "conv4", "conv5")
        return [self.get_submodule(part).get_parameter(kind) for part in parts for kind in ("weight", "bias")]


class Stage(nn.ModuleList):
    """Blocks of one width at one resolution, applied in turn.

    graphs: replays captured passes in their place, where it has any that fit.
    """

    graphs: StageGraphs | None = None

    def __init__(self, channels: int, depth: int, ffn_ratio: int) -> None:
        super().__init__(Block(channels, ffn_ratio) for _ in range(depth))
        self.channels = channels

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        replayed = self.graphs.run(self, x, condition) if self.graphs else None
        if replayed is not None:
            return replayed
        for block in self:
            x = block(x, condition)
        return x


class Downsample(nn.Module):
    """`(B, H, W, C)` -> `(B, H/2, W/2, 2C)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([Conv3x3(channels, channels // 2, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(self.body[0](x))


class Upsample(nn.Module):
    """`(B, H, W, C)` -> `(B, 2H, 2W, C/2)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([Conv3x3(channels, 2 * channels, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.body[0](x))


class FinalLayer(nn.Module):
    """The head: modulated LayerNorm and a 3x3 convolution, `(B, H, W, C)` -> `(B, H, W, out_channels)`.

    fused: the norm by the kernel.
    """

    fused = False

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = Conv3x3(channels, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)
        if self.fused:
            from dico_ray.models.kernels.block import norm_modulate

            return self.out_proj(norm_modulate(x, modulation)[0])
        return self.out_proj(layer_norm_modulate(x, *modulation.chunk(2, dim=-1)))
