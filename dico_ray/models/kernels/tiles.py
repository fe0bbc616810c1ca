"""How the kernels cut a tensor into programs. The cuts depend on shapes alone, so sums are the same in every run."""

from __future__ import annotations

from typing import NamedTuple

_PROGRAMS = 2048  # enough for some waves on any GPU; more would only add partial sums
_TILE = 2048  # elements that a program holds of a tensor at a time
_STAGES = 3
_CHANNELS = 64  # 128 bytes of bf16: 416, 832, 1664 and their FFN widths are multiples of 32 or 64


def power_of_two(number: int) -> int:
    """The least power of two that is not below the number (1 or more)."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


class Tiles(NamedTuple):
    """A program takes `rows` rows of `channels` channels of one image, `step` rows at a time.

    Rows are pixels, or for the convolution the image's rows of `width` pixels. splits: programs along the rows.
    stages: the row that is computed with, and those fetched ahead of it.
    """

    rows: int
    step: int
    width: int
    channels: int
    splits: int
    warps: int
    stages: int = 1


def whole_channels(images: int, pixels: int, channels: int) -> Tiles:
    """For LayerNorm: every program sees all channels of its pixels."""
    block = power_of_two(channels)
    step = max(1, min(4, _TILE // block, power_of_two(pixels)))
    return Tiles(*_rows(pixels, step, images), 1, block, _splits(pixels, step, images), _warps(step * block, 512))


def channel_blocks(images: int, pixels: int, channels: int) -> Tiles:
    """For elementwise passes with sums over the pixels."""
    block = min(_CHANNELS, power_of_two(channels))
    step = max(1, min(_TILE // block, power_of_two(pixels)))
    programs = images * ceil_div(channels, block)
    return Tiles(*_rows(pixels, step, programs), 1, block, _splits(pixels, step, programs), _warps(step * block, 512))


def image_rows(images: int, height: int, width: int, channels: int) -> Tiles:
    """For the convolution: a row of pixels at a time, the rows above and below kept in registers."""
    columns = power_of_two(width)
    block = max(1, min(_CHANNELS, power_of_two(channels), _TILE // 2 // columns))
    programs = images * ceil_div(channels, block)
    rows, step = _rows(height, 1, programs, least=8)  # each split reads two rows more
    return Tiles(rows, step, columns, block, ceil_div(height, rows), _warps(columns * block, 128), _STAGES)


def _rows(rows: int, step: int, programs: int, least: int = 1) -> tuple[int, int]:
    """Rows of a program: a multiple of step, few enough that there are about _PROGRAMS programs."""
    splits = max(1, min(ceil_div(rows, max(step, least)), _PROGRAMS // programs))
    return ceil_div(ceil_div(rows, splits), step) * step, step


def _splits(rows: int, step: int, programs: int) -> int:
    return ceil_div(rows, _rows(rows, step, programs)[0])


def _warps(elements: int, per_warp: int) -> int:
    return max(1, min(8, elements // per_warp))
