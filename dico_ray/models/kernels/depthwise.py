"""Depthwise 3x3 convolution with bias, and the pooled sum of its GELU, in one pass (twin: `plain.depthwise`).

A program goes down the rows of one image with a block of channels: each row is loaded three times (left, here,
right; once from memory, else from the cache) and adds to the three rows of output that it is part of. Threads hold
few values, since nine weights a channel fill their registers; rows are fetched ahead (STAGES) to keep memory busy.
"""

# A kernel's constant flags decide what is bound, and its launch takes Triton's own options: pyright sees neither.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_ray.models.kernels.activation import gelu_of
from dico_ray.models.kernels.tiles import ceil_div, image_rows

_SUMS = 11  # nine taps, bias, and the input's gradient


class Gradients(NamedTuple):
    """x `(B, H, W, C)`; weight `(C, 1, 3, 3)` and bias `(C,)` fp32; x_sum `(C,)`: x's gradient over all pixels."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    x_sum: Tensor


@triton.jit
def _row(x, base, row, height, width, channels, c, columns, inside):
    """A row of pixels moved by `columns - arange`, zero outside the image: fp32 (columns, channels)."""
    keep = ((columns >= 0) & (columns < width) & (row >= 0) & (row < height))[:, None] & inside[None, :]
    return tl.load(x + base + (row * width + columns)[:, None] * channels + c[None, :], mask=keep, other=0.0).to(
        tl.float32
    )


@triton.jit
def _depthwise_forward(
    x, weight, bias, pre, sums, height, width, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(2)
    first = split * ROWS
    inside = c < channels
    columns = tl.arange(0, WIDTH)
    taps = weight + c * 9
    w00 = tl.load(taps, mask=inside, other=0.0).to(tl.float32)[None, :]
    w01 = tl.load(taps + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    w02 = tl.load(taps + 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    w10 = tl.load(taps + 3, mask=inside, other=0.0).to(tl.float32)[None, :]
    w11 = tl.load(taps + 4, mask=inside, other=0.0).to(tl.float32)[None, :]
    w12 = tl.load(taps + 5, mask=inside, other=0.0).to(tl.float32)[None, :]
    w20 = tl.load(taps + 6, mask=inside, other=0.0).to(tl.float32)[None, :]
    w21 = tl.load(taps + 7, mask=inside, other=0.0).to(tl.float32)[None, :]
    w22 = tl.load(taps + 8, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    above = tl.zeros([WIDTH, BLOCK], tl.float32)  # what the output rows above and at the current one have so far
    here = tl.zeros([WIDTH, BLOCK], tl.float32)
    pooled = tl.zeros([WIDTH, BLOCK], tl.float32)
    base = image.to(tl.int64) * height * width * channels
    for i in tl.range(0, ROWS + 2, num_stages=STAGES):
        row = first - 1 + i
        left = _row(x, base, row, height, width, channels, c, columns - 1, inside)
        middle = _row(x, base, row, height, width, channels, c, columns, inside)
        right = _row(x, base, row, height, width, channels, c, columns + 1, inside)
        done = above + left * w20 + middle * w21 + right * w22 + b
        above = here + left * w10 + middle * w11 + right * w12
        here = left * w00 + middle * w01 + right * w02
        out = row - 1
        keep = ((columns < width) & (out >= first) & (out < height))[:, None] & inside[None, :]
        rounded = done.to(pre.dtype.element_ty)
        tl.store(pre + base + (out * width + columns)[:, None] * channels + c[None, :], rounded, mask=keep)
        pooled += tl.where(keep, gelu_of(rounded.to(tl.float32)), 0.0)
    tl.store(sums + (image * tl.num_programs(2) + split) * channels + c, tl.sum(pooled, axis=0), mask=inside)


@triton.jit
def _depthwise_backward(
    x, weight, d_pre, d_x, sums, height, width, channels,
    SUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(2)
    first = split * ROWS
    last = tl.minimum(first + ROWS, height)
    inside = c < channels
    columns = tl.arange(0, WIDTH)
    taps = weight + c * 9
    w00 = tl.load(taps, mask=inside, other=0.0).to(tl.float32)[None, :]
    w01 = tl.load(taps + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    w02 = tl.load(taps + 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    w10 = tl.load(taps + 3, mask=inside, other=0.0).to(tl.float32)[None, :]
    w11 = tl.load(taps + 4, mask=inside, other=0.0).to(tl.float32)[None, :]
    w12 = tl.load(taps + 5, mask=inside, other=0.0).to(tl.float32)[None, :]
    w20 = tl.load(taps + 6, mask=inside, other=0.0).to(tl.float32)[None, :]
    w21 = tl.load(taps + 7, mask=inside, other=0.0).to(tl.float32)[None, :]
    w22 = tl.load(taps + 8, mask=inside, other=0.0).to(tl.float32)[None, :]
    zero = tl.zeros([WIDTH, BLOCK], tl.float32)
    above, here = zero, zero
    x_above, x_here = zero, zero
    s00, s01, s02, s10, s11, s12, s20, s21, s22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    sum_bias, sum_x = zero, zero
    base = image.to(tl.int64) * height * width * channels
    for i in tl.range(0, ROWS + 2, num_stages=STAGES):
        row = first - 1 + i
        # A tap that looks at the left neighbour brings gradients back from the right one.
        d0 = _row(d_pre, base, row, height, width, channels, c, columns + 1, inside)
        d1 = _row(d_pre, base, row, height, width, channels, c, columns, inside)
        d2 = _row(d_pre, base, row, height, width, channels, c, columns - 1, inside)
        owned = (columns < width) & (row + 1 >= first)
        x_below = tl.where(owned[:, None], _row(x, base, row + 1, last, width, channels, c, columns, inside), 0.0)
        s00 += x_above * d0
        s01 += x_above * d1
        s02 += x_above * d2
        s10 += x_here * d0
        s11 += x_here * d1
        s12 += x_here * d2
        s20 += x_below * d0
        s21 += x_below * d1
        s22 += x_below * d2
        x_above = x_here + 0.0  # Triton 3.6 and 3.8 take a plain copy of a loop's value for its first value
        x_here = x_below
        sum_bias += tl.where((row >= first) & (row < last), d1, 0.0)
        done = above + d0 * w00 + d1 * w01 + d2 * w02
        above = here + d0 * w10 + d1 * w11 + d2 * w12
        here = d0 * w20 + d1 * w21 + d2 * w22
        out = row - 1
        keep = ((columns < width) & (out >= first) & (out < last))[:, None] & inside[None, :]
        at = base + (out * width + columns)[:, None] * channels + c[None, :]
        tl.store(d_x + at, done.to(d_x.dtype.element_ty), mask=keep)
        sum_x += tl.where(keep, done, 0.0)
    out_sums = sums + (image * tl.num_programs(2) + split) * SUMS * channels + c
    tl.store(out_sums, tl.sum(s00, axis=0), mask=inside)
    tl.store(out_sums + channels, tl.sum(s01, axis=0), mask=inside)
    tl.store(out_sums + 2 * channels, tl.sum(s02, axis=0), mask=inside)
    tl.store(out_sums + 3 * channels, tl.sum(s10, axis=0), mask=inside)
    tl.store(out_sums + 4 * channels, tl.sum(s11, axis=0), mask=inside)
    tl.store(out_sums + 5 * channels, tl.sum(s12, axis=0), mask=inside)
    tl.store(out_sums + 6 * channels, tl.sum(s20, axis=0), mask=inside)
    tl.store(out_sums + 7 * channels, tl.sum(s21, axis=0), mask=inside)
    tl.store(out_sums + 8 * channels, tl.sum(s22, axis=0), mask=inside)
    tl.store(out_sums + 9 * channels, tl.sum(sum_bias, axis=0), mask=inside)
    tl.store(out_sums + 10 * channels, tl.sum(sum_x, axis=0), mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> pre-activation like x, and its GELU's mean over the pixels, `(B, C)` in fp32.

    x `(B, H, W, C)` contiguous, weight `(C, 1, 3, 3)`, bias `(C,)`.
    """
    images, height, width, channels = x.shape
    tiles = image_rows(images, height, width, channels, block=32)
    pre = torch.empty_like(x)
    sums = torch.empty(images, tiles.splits, channels, dtype=torch.float32, device=x.device)
    _depthwise_forward[(images, ceil_div(channels, tiles.channels), tiles.splits)](
        x, weight, bias, pre, sums, height, width, channels,
        ROWS=tiles.rows, WIDTH=tiles.width, BLOCK=tiles.channels, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return pre, sums.sum(1) / (height * width)


def backward(d_pre: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    """d_pre: gradient of the pre-activation, `(B, H, W, C)` contiguous like x."""
    images, height, width, channels = x.shape
    tiles = image_rows(images, height, width, channels, block=16)
    d_x = torch.empty_like(x)
    sums = torch.empty(images * tiles.splits, _SUMS, channels, dtype=torch.float32, device=x.device)
    _depthwise_backward[(images, ceil_div(channels, tiles.channels), tiles.splits)](
        x, weight, d_pre, d_x, sums, height, width, channels,
        SUMS=_SUMS, ROWS=tiles.rows, WIDTH=tiles.width, BLOCK=tiles.channels, STAGES=tiles.stages,
        num_warps=tiles.warps,
    )  # fmt: skip
    total = sums.sum(0)
    return Gradients(d_x, total[:9].t().reshape(channels, 1, 3, 3), total[9], total[10])
