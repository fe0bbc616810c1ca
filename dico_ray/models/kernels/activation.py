"""The exact GELU by itself and with channel attention's weighing; backward passes compute it again from its input.

Twins: `torch.nn.functional.gelu` and `plain.gelu_scale`.
"""

# A kernel's constant flags decide what is bound, and its launch takes Triton's own options: pyright sees neither.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_ray.models.kernels.tiles import ceil_div, channel_blocks


@triton.jit
def normal_of(x):
    """Phi(x), the normal distribution's integral, and exp(-x^2 / 2).

    By one exponential: erfc(z) = exp(-z^2) p(1 / (1 + 0.4 z)), in the form of Abramowitz and Stegun 7.1.26 with a
    polynomial p one degree higher, fitted for z >= 0: erfc is off by less than 5e-8, what fp32 rounds off 1 + erf. It
    takes half of erf's instructions, which count where a product's tiles wait for them, and keeps small values of
    Phi, where 1 + erf cancels.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.28284271247461906 * tl.abs(x))
    p = 0.7228792631236576 + t * -0.20355131700030038
    p = 0.4870284267156587 + t * (-0.3936773949811563 + t * p)
    p = t * (0.23316795149920574 + t * (0.15415302672482756 + t * p))
    tail = 0.5 * p * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def gelu_of(x):
    """x Phi(x) (arXiv 1606.08415)."""
    phi, _ = normal_of(x)
    return x * phi


@triton.jit
def _gelu_slope(x):
    """Derivative of the GELU: Phi(x) + x phi(x)."""
    phi, bell = normal_of(x)
    return phi + x * bell * 0.3989422804014327


@triton.jit
def _gelu_forward(
    pre, scale, out, pixels, channels,
    HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    base = image.to(tl.int64) * pixels * channels
    if HAS_SCALE:
        factor = tl.load(scale + image * channels + c, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, ROWS, STEP):
        p = tl.program_id(2) * ROWS + start + tl.arange(0, STEP)
        keep = (p < pixels)[:, None] & inside[None, :]
        at = base + p[:, None] * channels + c[None, :]
        result = gelu_of(tl.load(pre + at, mask=keep, other=0.0).to(tl.float32))
        if HAS_SCALE:
            result = result * factor[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _gelu_backward(
    pre, scale, pooled, d_out, d_pre, out, sums, pixels, channels,
    HAS_SCALE: tl.constexpr, SLOPE: tl.constexpr, AGAIN: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AGAIN: writes the forward's output. SLOPE: writes d_pre, and sums it; otherwise sums d_out gelu(pre)."""
    image = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(2)
    inside = c < channels
    base = image.to(tl.int64) * pixels * channels
    if HAS_SCALE:
        factor = tl.load(scale + image * channels + c, mask=inside, other=0.0).to(tl.float32)
        if SLOPE:
            level = tl.load(pooled + image * channels + c, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ROWS, STEP):
        p = split * ROWS + start + tl.arange(0, STEP)
        keep = (p < pixels)[:, None] & inside[None, :]
        at = base + p[:, None] * channels + c[None, :]
        value = tl.load(pre + at, mask=keep, other=0.0).to(tl.float32)
        d = tl.load(d_out + at, mask=keep, other=0.0).to(tl.float32)
        if AGAIN:
            result = gelu_of(value)
            if not SLOPE:
                total += tl.sum(d * result, axis=0)
            if HAS_SCALE:
                result = result * factor[None, :]
            tl.store(out + at, result.to(out.dtype.element_ty), mask=keep)
        if SLOPE:
            if HAS_SCALE:
                d = d * factor[None, :] + level[None, :]
            d = tl.where(keep, d * _gelu_slope(value), 0.0)
            tl.store(d_pre + at, d.to(d_pre.dtype.element_ty), mask=keep)
            total += tl.sum(d, axis=0)
    tl.store(sums + (image * tl.num_programs(2) + split) * channels + c, total, mask=inside)


def gelu(x: Tensor) -> Tensor:
    """x `(B, H, W, C)` contiguous."""
    return _forward(x, None)


def gelu_scale(pre: Tensor, scale: Tensor) -> Tensor:
    """`gelu(pre) * scale`: pre `(B, H, W, C)`, scale `(B, C)`, both contiguous."""
    return _forward(pre, scale)


def gelu_backward(d_out: Tensor, x: Tensor, again: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> x's gradient; that summed to `(C,)` in fp32; if `again`, gelu(x) for the gradient of what took it."""
    d_x, out, sums = _backward(d_out, x, None, None, slope=True, again=again)
    assert d_x is not None
    return d_x, sums.sum(0), out


def gelu_scale_backward_scale(d_out: Tensor, pre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> scale's gradient `(B, C)` in fp32, and gelu_scale(pre, scale) again."""
    _, out, sums = _backward(d_out, pre, scale, None, slope=False, again=True)
    assert out is not None
    return sums, out


def gelu_scale_backward(d_out: Tensor, pre: Tensor, scale: Tensor, d_pooled: Tensor) -> Tensor:
    """-> gradient of pre. d_pooled `(B, C)`: gradient of every pixel's GELU from its pooling."""
    d_pre, _, _ = _backward(d_out, pre, scale, d_pooled, slope=True, again=False)
    assert d_pre is not None
    return d_pre


def _forward(pre: Tensor, scale: Tensor | None) -> Tensor:
    images, height, width, channels = pre.shape
    tiles = channel_blocks(height * width, channels, block=128, step=8, turns=1, warps=2)
    out = torch.empty_like(pre)
    _gelu_forward[(images, ceil_div(channels, tiles.channels), tiles.splits)](
        pre, scale, out, height * width, channels,
        HAS_SCALE=scale is not None, ROWS=tiles.rows, STEP=tiles.step, BLOCK=tiles.channels, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _backward(
    d_out: Tensor, pre: Tensor, scale: Tensor | None, pooled: Tensor | None, *, slope: bool, again: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    images, height, width, channels = pre.shape
    if scale is None:
        tiles = channel_blocks(height * width, channels, block=128, step=8, turns=4, warps=2)
    else:
        tiles = channel_blocks(height * width, channels, block=64, step=32, turns=1, warps=4)
    d_pre = torch.empty_like(pre) if slope else None
    out = torch.empty_like(pre) if again else None
    sums = torch.empty(images, tiles.splits, channels, dtype=torch.float32, device=pre.device)
    _gelu_backward[(images, ceil_div(channels, tiles.channels), tiles.splits)](
        pre, scale, pooled, d_out, d_pre, out, sums, height * width, channels,
        HAS_SCALE=scale is not None, SLOPE=slope, AGAIN=again,
        ROWS=tiles.rows, STEP=tiles.step, BLOCK=tiles.channels, num_warps=tiles.warps,
    )  # fmt: skip
    return d_pre, out, sums.sum(1)
