"""Matrix products that do the feed-forward half's GELU on their tiles, while these are still in registers.

The library's product writes a tile that a pass of its own then reads, to write another: of the widest tensors of the
network. Here the tile goes through the GELU on its way out. Products without a GELU stay the library's.

Tiles are read and written through tensor descriptors (TMA on Hopper), which cut off what lies beyond the edges; they
ask for rows of a multiple of 16 bytes. Sums go to a table with a row for each tile, without atomics: equal in every
run. Twins: `torch.nn.functional.linear` and `gelu`, in fp32 from rounded inputs.
"""

# A kernel's constant flags decide what is bound, and its launch takes Triton's own options: pyright sees neither.
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dico_ray.models.kernels.activation import gelu_of, normal_of
from dico_ray.models.kernels.tiles import ProductTiles, ceil_div, product_tiles

Use = Literal["inference", "forward", "backward"]

# From how many multiplications (rows x inner x columns) on a product with GELU is made here instead of by the library
# and a pass; None: never. inference: `linear_gelu` without the pre-activation; forward: with it; backward: `gelu_input_
# gradient`.
LEAST: dict[Use, int | None] = {"inference": 2**30, "forward": 2**30, "backward": 2**30}
# fp32 stays with the library: its products are far from being bound by memory, and not what tensor cores are for.
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of what a descriptor describes and of its rows


@triton.jit
def _place(tile, rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. Tiles that run together share rows and columns: GROUP rows of tiles at a time."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = tile % (GROUP * across)
    return (group * GROUP + inside % height) * BM, (inside // height) * BN


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)).split()


@triton.jit
def _write_gelu(part, bias, pre, out, m, n, columns, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    c = n + tl.arange(0, WIDTH)
    value = part + tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    rounded = value.to(out.dtype)
    if KEEP:
        pre.store([m, n], rounded)
    # Of the rounded one: what the backward pass will see.
    out.store([m, n], gelu_of(rounded.to(tl.float32)).to(out.dtype))


@triton.jit
def _linear_gelu(
    x, weight, bias, pre, out, rows, inner, columns,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (rows, inner), weight (columns, inner), pre and out (rows, columns), all but bias by descriptors.

    PARTS: in how many parts a tile is written, 1, 2 or 4.
    """
    tiles = tl.cdiv(rows, BM) * tl.cdiv(columns, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        m, n = _place(tile, rows, columns, BM, BN, GROUP)
        total = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, tl.cdiv(inner, BK), num_stages=STAGES):
            a, b = x.load([m, k * BK]), weight.load([n, k * BK])
            total = tl.dot(a, b.T, total, input_precision=PRECISION)
        if PARTS == 1:
            _write_gelu(total, bias, pre, out, m, n, columns, BN, KEEP)
        else:
            left, right = _halves(total, BM, BN)
            if PARTS == 2:
                _write_gelu(left, bias, pre, out, m, n, columns, BN // 2, KEEP)
                _write_gelu(right, bias, pre, out, m, n + BN // 2, columns, BN // 2, KEEP)
            else:
                first, second = _halves(left, BM, BN // 2)
                third, fourth = _halves(right, BM, BN // 2)
                _write_gelu(first, bias, pre, out, m, n, columns, BN // 4, KEEP)
                _write_gelu(second, bias, pre, out, m, n + BN // 4, columns, BN // 4, KEEP)
                _write_gelu(third, bias, pre, out, m, n + BN // 2, columns, BN // 4, KEEP)
                _write_gelu(fourth, bias, pre, out, m, n + 3 * BN // 4, columns, BN // 4, KEEP)


@triton.jit
def _write_gradient(
    part, wide, d_wide, again, sums, m, n, columns, BM: tl.constexpr, WIDTH: tl.constexpr, AGAIN: tl.constexpr
):  # fmt: skip
    value = wide.load([m, n]).to(tl.float32)
    phi, bell = normal_of(value)
    if AGAIN:
        again.store([m, n], (value * phi).to(again.dtype))
    # Rounded before as well, as the library's product would be: both ways give the same numbers.
    d = part.to(d_wide.dtype).to(tl.float32) * (phi + value * bell * 0.3989422804014327)
    d_wide.store([m, n], d.to(d_wide.dtype))
    c = n + tl.arange(0, WIDTH)
    # Beyond the last row the product is zero.
    tl.store(sums + (m // BM) * columns + c, tl.sum(d, axis=0), mask=c < columns)


@triton.jit
def _gelu_input_gradient(
    d_out, weight, wide, d_wide, again, sums, rows, inner, columns,
    AGAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_out (rows, inner), weight (inner, columns), the rest (rows, columns), by descriptors."""
    tiles = tl.cdiv(rows, BM) * tl.cdiv(columns, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        m, n = _place(tile, rows, columns, BM, BN, GROUP)
        total = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, tl.cdiv(inner, BK), num_stages=STAGES):
            a, b = d_out.load([m, k * BK]), weight.load([k * BK, n])
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if PARTS == 1:
            _write_gradient(total, wide, d_wide, again, sums, m, n, columns, BM, BN, AGAIN)
        else:
            left, right = _halves(total, BM, BN)
            if PARTS == 2:
                _write_gradient(left, wide, d_wide, again, sums, m, n, columns, BM, BN // 2, AGAIN)
                _write_gradient(right, wide, d_wide, again, sums, m, n + BN // 2, columns, BM, BN // 2, AGAIN)
            else:
                first, second = _halves(left, BM, BN // 2)
                third, fourth = _halves(right, BM, BN // 2)
                _write_gradient(first, wide, d_wide, again, sums, m, n, columns, BM, BN // 4, AGAIN)
                _write_gradient(second, wide, d_wide, again, sums, m, n + BN // 4, columns, BM, BN // 4, AGAIN)
                _write_gradient(third, wide, d_wide, again, sums, m, n + BN // 2, columns, BM, BN // 4, AGAIN)
                _write_gradient(fourth, wide, d_wide, again, sums, m, n + 3 * BN // 4, columns, BM, BN // 4, AGAIN)


def pays(use: Use, x: Tensor, weight: Tensor, columns: int) -> bool:
    """Whether the product of x `(..., K)` with weight, N = `columns` wide, is made here instead of by the library.

    By its sizes, its dtype, and whether descriptors can tell where both lie.
    """
    least, inner = LEAST[use], x.shape[-1]
    if least is None or x.dtype not in DTYPES or x.numel() * columns < least:
        return False
    steps = (inner * x.itemsize, columns * x.itemsize, x.data_ptr(), weight.data_ptr())
    return all(step % _ALIGNMENT == 0 for step in steps)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool, tiles: ProductTiles | None = None
) -> tuple[Tensor | None, Tensor]:
    """-> `linear(x, weight, bias)` if keep, else None; and its GELU: `(..., N)` like x.

    x `(..., K)` and weight `(N, K)` contiguous, bias `(N,)`; rows of x, weight and the output are multiples of 16
    bytes. tiles: other ones than `tiles.product_tiles` gives.
    """
    columns, inner = weight.shape
    flat = x.view(-1, inner)
    rows = flat.shape[0]
    t = tiles or product_tiles("forward" if keep else "inference")
    out = x.new_empty(*x.shape[:-1], columns)
    pre = torch.empty_like(out) if keep else None
    written = [t.rows, t.columns // t.parts]
    _linear_gelu[(_programs(t, rows, columns, x.device),)](
        _described(flat, [t.rows, t.inner]), _described(weight, [t.columns, t.inner]), bias,
        None if pre is None else _described(pre.view(rows, columns), written),
        _described(out.view(rows, columns), written), rows, inner, columns,
        KEEP=keep, **_flags(t, x.dtype),
    )  # fmt: skip
    return pre, out


def gelu_input_gradient(
    d_out: Tensor, weight: Tensor, wide: Tensor, again: bool = True, tiles: ProductTiles | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of `linear(gelu(wide), weight)` by wide -> that `(..., N)`; summed to `(N,)` in fp32; if `again`, gelu(wide).

    d_out `(..., K)`, weight `(K, N)`, wide `(..., N)`, all contiguous; their rows are multiples of 16 bytes.
    """
    inner, columns = weight.shape
    flat, level = d_out.view(-1, inner), wide.view(-1, columns)
    rows = flat.shape[0]
    t = tiles or product_tiles("backward")
    d_wide = torch.empty_like(wide)
    made = torch.empty_like(wide) if again else None
    sums = torch.empty(ceil_div(rows, t.rows), columns, dtype=torch.float32, device=wide.device)
    written = [t.rows, t.columns // t.parts]
    _gelu_input_gradient[(_programs(t, rows, columns, wide.device),)](
        _described(flat, [t.rows, t.inner]), _described(weight, [t.inner, t.columns]), _described(level, written),
        _described(d_wide.view(rows, columns), written),
        None if made is None else _described(made.view(rows, columns), written), sums, rows, inner, columns,
        AGAIN=again, **_flags(t, wide.dtype),
    )  # fmt: skip
    return d_wide, sums.sum(0), made


def _described(matrix: Tensor, tile: Sequence[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))


def _programs(tiles: ProductTiles, rows: int, columns: int, device: torch.device) -> int:
    """One for each tile, or as many as run at a time, each of which takes several."""
    number = ceil_div(rows, tiles.rows) * ceil_div(columns, tiles.columns)
    if not tiles.persistent or device.type != "cuda":
        return number
    return min(number, tiles.persistent * torch.cuda.get_device_properties(device).multi_processor_count)


def _flags(tiles: ProductTiles, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner, "GROUP": tiles.group, "PARTS": tiles.parts,
        "STAGES": tiles.stages, "PERSISTENT": tiles.persistent > 0,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "num_warps": tiles.warps,
        "maxnreg": tiles.registers,
    }  # fmt: skip
