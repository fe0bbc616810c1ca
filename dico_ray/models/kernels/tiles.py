"""How the kernels cut a tensor into programs. The cuts depend on shapes alone, so sums are the same in every run.

The constants are those of the fastest among some 45 to 80 cuts a kernel, timed on an H100 at DiCo-H's stages in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

_PROGRAMS = 2048  # enough for some waves on any GPU; more would only add partial sums
_SUMMING_PROGRAMS = 512  # of passes whose programs each leave up to four sums of all channels


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


def whole_channels(images: int, pixels: int, channels: int, sums: bool) -> Tiles:
    """For LayerNorm: every program sees all channels of its pixels. sums: it also sums them over its pixels."""
    block = power_of_two(channels)
    step = min(8, max(1, (8192 if sums else 2048) // block), power_of_two(pixels))
    rows = _rows(pixels, step, images, _SUMMING_PROGRAMS) if sums else step
    per_warp = 512 if not sums else 2048 if block <= 1024 else 1024  # wide sums fill registers too
    return Tiles(rows, step, 1, block, ceil_div(pixels, rows), _warps(step * block, per_warp))


def channel_blocks(pixels: int, channels: int, block: int, step: int, turns: int, warps: int) -> Tiles:
    """For elementwise passes: `turns` times `step` pixels of `block` channels a program, or what there is of these."""
    block, step = min(block, power_of_two(channels)), min(step, power_of_two(pixels))
    rows = step * min(turns, ceil_div(pixels, step))
    return Tiles(rows, step, 1, block, ceil_div(pixels, rows), warps)


def image_rows(images: int, height: int, width: int, channels: int, block: int) -> Tiles:
    """For the convolution: a row of pixels of `block` channels at a time, the rows around it kept in registers."""
    columns = power_of_two(width)
    block = min(block, power_of_two(channels), max(1, 2048 // columns))
    programs = images * ceil_div(channels, block)
    rows = _rows(height, 1, programs, _PROGRAMS, least=8)  # each split reads two rows more
    return Tiles(rows, 1, columns, block, ceil_div(height, rows), _warps(columns * block, 256), stages=3)


def _rows(rows: int, step: int, programs: int, enough: int, least: int = 1) -> int:
    """Rows of a program: a multiple of step, few enough that there are about `enough` programs."""
    splits = max(1, min(ceil_div(rows, max(step, least)), enough // programs))
    return ceil_div(ceil_div(rows, splits), step) * step


def _warps(elements: int, per_warp: int) -> int:
    return max(1, min(8, elements // per_warp))
