"""What a DiCo costs, from its sizes alone: parameters and multiply-adds. Needs no torch."""

from __future__ import annotations

from dico_ray.config import Architecture, Model

_FEATURES = 256  # sinusoids of a timestep
_FLOPS_PER_MAC = 6  # of training: two operations a multiply-add; the backward pass costs the forward one twice


def stage_widths(a: Architecture) -> tuple[int, int, int, int, int]:
    """Channels of encoder 1, encoder 2, latent, decoder 2 and decoder 1."""
    d = a.hidden_size
    return d, 2 * d, 4 * d, 2 * d, 2 * d


def parameter_count(model: Model) -> int:
    """Parameters of a DiCo (learned variance), from its sizes alone."""
    a = model.architecture
    d, widths = a.hidden_size, stage_widths(a)
    outputs = 2 * model.in_channels
    count = 9 * model.in_channels * d + d  # input convolution
    for width in (d, 2 * d, 4 * d):
        count += _FEATURES * width + width + width * width + width  # timestep embedder
        count += (model.num_classes + 1) * width  # labels, the null one among them
    count += sum(depth * block_parameters(width, a.ffn_ratio) for depth, width in zip(a.depths, widths, strict=True))
    count += 9 * d * d // 2 + 9 * 2 * d * d  # down: 3x3 to half the channels
    count += 9 * 4 * d * 8 * d + 9 * 2 * d * 4 * d  # up: 3x3 to twice the channels
    count += 4 * d * 2 * d + 2 * d + 2 * d * 2 * d + 2 * d  # after the skips
    head = 2 * d
    return count + 9 * head * outputs + outputs + head * 2 * head + 2 * head


def block_parameters(width: int, ffn_ratio: int) -> int:
    """Parameters of a block: three 1x1 and a depthwise convolution, feed-forward, adaLN, of `width` channels.

    One of the 1x1 is the channel attention's. ffn_ratio: the feed-forward half's width over the block's own.
    """
    pointwise = width * width + width
    hidden = ffn_ratio * width
    return (
        3 * pointwise + 9 * width + width + width * hidden + hidden + hidden * width + width
        + width * 6 * width + 6 * width
    )  # fmt: skip


def forward_macs(model: Model) -> int:
    """Multiply-adds of one image's forward pass at model.latent_size, from its sizes alone.

    All convolutions and linear layers: blocks, resampling, skips, head, and what runs once an image (timestep
    embedders, adaLN, channel attention). Not norms, activations, biases, gates, means, and lookups of labels.
    """
    a = model.architecture
    d, outputs = a.hidden_size, 2 * model.in_channels
    full = model.latent_size**2
    half, quarter = full // 4, full // 16
    count = 9 * model.in_channels * d * full  # input convolution
    count += sum(_FEATURES * width + width * width for width in (d, 2 * d, 4 * d))  # timestep embedders
    pixels = (full, half, quarter, half, full)
    for depth, width, area in zip(a.depths, stage_widths(a), pixels, strict=True):
        count += depth * _block_macs(width, a.ffn_ratio, area)
    count += 9 * d * d // 2 * full + 9 * 2 * d * d * half  # down: before pixels are gathered into channels
    count += 9 * 4 * d * 8 * d * quarter + 9 * 2 * d * 4 * d * half  # up: before channels are spread to pixels
    count += 4 * d * 2 * d * half + 2 * d * 2 * d * full  # after the skips
    head = 2 * d
    return count + 9 * head * outputs * full + head * 2 * head


def _block_macs(width: int, ffn_ratio: int, pixels: int) -> int:
    """Two 1x1, depthwise and feed-forward at each pixel; channel attention and adaLN once an image."""
    each_pixel = 2 * width * width + 9 * width + 2 * ffn_ratio * width * width
    return each_pixel * pixels + width * width + 6 * width * width


def training_flops(model: Model) -> int:
    """Floating-point operations of training on one image: 6 x `forward_macs`.

    The usual convention: a multiply-add is two operations, and the backward pass takes two such products, by the
    inputs and by the weights, for each of the forward pass. Recomputation, optimizer and EMA do not count.
    """
    return _FLOPS_PER_MAC * forward_macs(model)
