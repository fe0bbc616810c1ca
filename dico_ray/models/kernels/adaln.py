"""LayerNorm with modulation, and gate with residual: either alone, or both in one pass (twins in `plain`).

Sums over an image's pixels are taken in two stages of fixed shape, without atomics: equal in every run.
"""

# A kernel's constant flags decide what is bound, and its launch takes Triton's own options: pyright sees neither.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_ray.models.kernels.plain import NORM_EPS
from dico_ray.models.kernels.tiles import whole_channels


class Normed(NamedTuple):
    """stream: the block's stream after the residual; normed: its modulated LayerNorm; stats `(2, B H W)`: mean and
    reciprocal standard deviation of each pixel, fp32."""

    stream: Tensor
    normed: Tensor
    stats: Tensor


class Gradients(NamedTuple):
    """stream, branch and normed are `(B, H, W, C)`, the rest `(B, C)` in fp32; what a pass has not is None.

    normed: the forward's modulated LayerNorm again, for the gradient of the product that took it. total: the
    stream's gradient summed over an image's pixels; times the gate that is the branch's own sum.
    """

    stream: Tensor | None
    branch: Tensor | None
    normed: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    total: Tensor | None


@triton.jit
def _adaln_forward(
    x, branch, gate, shift, scale, stream, normed, stats, pixels, channels, images, modulation_stride, eps,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    c = tl.arange(0, BLOCK)
    inside = c < channels
    vector = image * modulation_stride + c
    if HAS_BRANCH:
        g = tl.load(gate + vector, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = 1.0 + tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + vector, mask=inside, other=0.0).to(tl.float32)
    base = image.to(tl.int64) * pixels * channels
    for start in range(0, ROWS, STEP):
        p = first + start + tl.arange(0, STEP)
        keep = (p < pixels)[:, None] & inside[None, :]
        at = base + p[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            added = tl.load(branch + at, mask=keep, other=0.0).to(tl.float32)
            rounded = (value + g[None, :] * added).to(stream.dtype.element_ty)
            tl.store(stream + at, rounded, mask=keep)
            value = rounded.to(tl.float32)  # the backward pass will see this one
        if HAS_NORM:
            mean = tl.sum(value, axis=1) / channels
            centred = tl.where(keep, value - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
            result = centred * rstd[:, None] * factor[None, :] + offset[None, :]
            tl.store(normed + at, result.to(normed.dtype.element_ty), mask=keep)
            row = image * pixels + p
            tl.store(stats + row, mean, mask=p < pixels)
            tl.store(stats + images * pixels + row, rstd, mask=p < pixels)


@triton.jit
def _adaln_backward(
    x, stats, shift, scale, branch, gate, d_stream, d_normed, d_x, d_branch, normed, sums,
    pixels, channels, images, modulation_stride,
    HAS_NORM: tl.constexpr, HAS_STREAM: tl.constexpr, HAS_BRANCH: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    split = tl.program_id(1)
    first = split * ROWS
    c = tl.arange(0, BLOCK)
    inside = c < channels
    vector = image * modulation_stride + c
    if HAS_BRANCH:
        g = tl.load(gate + vector, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = 1.0 + tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + vector, mask=inside, other=0.0).to(tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_total = tl.zeros([BLOCK], tl.float32)
    base = image.to(tl.int64) * pixels * channels
    for start in range(0, ROWS, STEP):
        p = first + start + tl.arange(0, STEP)
        keep = (p < pixels)[:, None] & inside[None, :]
        at = base + p[:, None] * channels + c[None, :]
        total = tl.zeros([STEP, BLOCK], tl.float32)
        if HAS_STREAM:
            total += tl.load(d_stream + at, mask=keep, other=0.0).to(tl.float32)
        if HAS_NORM:
            row = image * pixels + p
            mean = tl.load(stats + row, mask=p < pixels, other=0.0)
            rstd = tl.load(stats + images * pixels + row, mask=p < pixels, other=0.0)
            value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
            unit = tl.where(keep, (value - mean[:, None]) * rstd[:, None], 0.0)
            d = tl.load(d_normed + at, mask=keep, other=0.0).to(tl.float32)
            again = unit * factor[None, :] + offset[None, :]
            tl.store(normed + at, again.to(normed.dtype.element_ty), mask=keep)
            sum_shift += tl.sum(d, axis=0)
            sum_scale += tl.sum(d * unit, axis=0)
            d = d * factor[None, :]
            level = tl.sum(d, axis=1) / channels
            slope = tl.sum(d * unit, axis=1) / channels
            total += (d - level[:, None] - unit * slope[:, None]) * rstd[:, None]
            tl.store(d_x + at, total.to(d_x.dtype.element_ty), mask=keep)
        if HAS_BRANCH:
            added = tl.load(branch + at, mask=keep, other=0.0).to(tl.float32)
            total = tl.where(keep, total, 0.0)
            tl.store(d_branch + at, (total * g[None, :]).to(d_branch.dtype.element_ty), mask=keep)
            sum_gate += tl.sum(total * added, axis=0)
            sum_total += tl.sum(total, axis=0)
    out = sums + (image * tl.num_programs(1) + split) * SUMS * channels + c
    if HAS_NORM:
        tl.store(out, sum_shift, mask=inside)
        tl.store(out + channels, sum_scale, mask=inside)
    if HAS_BRANCH:
        tl.store(out + (SUMS - 2) * channels, sum_gate, mask=inside)
        tl.store(out + (SUMS - 1) * channels, sum_total, mask=inside)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Normed:
    """Twin: `plain.layer_norm_modulate`. x `(B, H, W, C)` contiguous; shift, scale `(B, C)`, equally strided rows."""
    return _forward(x, None, None, shift, scale)


def residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Twin: `plain.gated_residual`."""
    return _forward(x, branch, gate, None, None).stream


def residual_norm_modulate(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Normed:
    """The two in one pass: the stream after the residual, and its modulated LayerNorm."""
    return _forward(x, branch, gate, shift, scale)


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> Normed:
    images, height, width, channels = x.shape
    pixels = height * width
    stream = torch.empty_like(x) if branch is not None else x
    normed = torch.empty_like(x) if scale is not None else x
    stats = torch.empty(2, images * pixels if scale is not None else 0, dtype=torch.float32, device=x.device)
    tiles = whole_channels(images, pixels, channels, sums=False)
    _adaln_forward[(images, tiles.splits)](
        x, branch, gate, shift, scale, stream, normed, stats, pixels, channels, images, _stride(gate, shift, scale),
        NORM_EPS, HAS_BRANCH=branch is not None, HAS_NORM=scale is not None, ROWS=tiles.rows, STEP=tiles.step,
        BLOCK=tiles.channels, num_warps=tiles.warps,
    )  # fmt: skip
    return Normed(stream, normed, stats)


def norm_modulate_backward(
    d_stream: Tensor | None, d_normed: Tensor, x: Tensor, stats: Tensor, shift: Tensor, scale: Tensor
) -> Gradients:
    """d_stream: what the stream's gradient already is from elsewhere; it is added to. None: nothing."""
    return _backward(d_stream, d_normed, x, stats, shift, scale, None, None)


def residual_backward(d_stream: Tensor, branch: Tensor, gate: Tensor) -> Gradients:
    """Of `residual`; x's gradient is d_stream itself."""
    return _backward(d_stream, None, branch, None, None, None, branch, gate)


def residual_norm_modulate_backward(
    d_stream: Tensor, d_normed: Tensor, stream: Tensor, stats: Tensor, branch: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor,
) -> Gradients:  # fmt: skip
    """Of `residual_norm_modulate`; stream and stats are its outputs."""
    return _backward(d_stream, d_normed, stream, stats, shift, scale, branch, gate)


def _backward(
    d_stream: Tensor | None, d_normed: Tensor | None, x: Tensor, stats: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, branch: Tensor | None, gate: Tensor | None,
) -> Gradients:  # fmt: skip
    images, height, width, channels = x.shape
    pixels = height * width
    norm, gated = d_normed is not None, branch is not None
    d_x = torch.empty_like(x) if norm else None
    normed = torch.empty_like(x) if norm else None
    d_branch = torch.empty_like(x) if gated else None
    tiles = whole_channels(images, pixels, channels, sums=True)
    count = 2 * norm + 2 * gated
    sums = torch.empty(images, tiles.splits, count, channels, dtype=torch.float32, device=x.device)
    _adaln_backward[(images, tiles.splits)](
        x, stats, shift, scale, branch, gate, d_stream, d_normed, d_x, d_branch, normed, sums, pixels, channels, images,
        _stride(gate, shift, scale), HAS_NORM=norm, HAS_STREAM=d_stream is not None, HAS_BRANCH=gated, SUMS=count,
        ROWS=tiles.rows, STEP=tiles.step, BLOCK=tiles.channels, num_warps=tiles.warps,
    )  # fmt: skip
    found: list[Tensor | None] = list(sums.sum(1).unbind(1))
    d_shift, d_scale = found[:2] if norm else (None, None)
    d_gate, total = found[-2:] if gated else (None, None)
    return Gradients(d_x, d_branch, normed, d_shift, d_scale, d_gate, total)


def _stride(*vectors: Tensor | None) -> int:
    """Elements from one image's vector to the next: all are slices of one modulation, or contiguous."""
    strides = {v.stride(0) for v in vectors if v is not None}
    assert len(strides) == 1 and all(v.stride(1) == 1 for v in vectors if v is not None)
    return strides.pop()
