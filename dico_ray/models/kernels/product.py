"""The feed-forward half's first product with the GELU on its tiles while these are in registers, without gradients.

The library's product writes a tensor, the widest of the network, that a pass of its own reads to write another. Here a
tile goes through the GELU on its way out. Other products stay the library's, and so do all of training: with the
pre-activation kept for the backward pass, and with the GELU's slope on the second product's gradient, DiCo-H at
micro-batch 64 on an H100 went from 282.3 images/s to 284.0 by the first, 286.0 by the second (on another card) and
282.7 by both, one run each. Triton's product is slower than cuBLAS's by about what the pass costs.

Tiles are read and written through tensor descriptors (TMA on Hopper), which cut off what lies beyond the edges; they
ask for rows of a multiple of 16 bytes. Twin: `torch.nn.functional.gelu` of `linear`.
"""

# A launch takes Triton's own options, and loops run over its ranges: pyright sees neither.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dico_ray.models.kernels.activation import gelu_of
from dico_ray.models.kernels.tiles import ceil_div

# A program makes a tile of TILE_ROWS x TILE_COLUMNS, TILE_INNER values of the sum at a time, with STAGES tiles of the
# factors in flight; GROUP rows of tiles run together. Of twelve such cuts the fastest over DiCo's shapes on an H100.
TILE_ROWS, TILE_COLUMNS, TILE_INNER = 128, 128, 64
STAGES, WARPS, GROUP = 3, 8, 8
REGISTERS = 128  # the most that a thread may take: two programs fit a multiprocessor

# Where the product is made here instead of by the library and a pass. It pays where the sum is short, for the pass is
# then much of the time: on an H100 sums of 416 and 832 take 0.82 to 0.98 of the library's time, pass included, and
# those of 1664 take 1.08 to 1.16.
LONGEST_SUM = 1024
LEAST = 2**30  # multiplications, rows x inner x columns
# fp32 stays with the library: its products are far from being bound by memory, and not what tensor cores are for.
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of what a descriptor describes and of its rows


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)).split()


@triton.jit
def _write_gelu(part, bias, out, m, n, columns, WIDTH: tl.constexpr):
    c = n + tl.arange(0, WIDTH)
    value = part + tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    # Rounded before as well, as the library's product would be: both ways give the same numbers.
    out.store([m, n], gelu_of(value.to(out.dtype).to(tl.float32)).to(out.dtype))


@triton.jit
def _linear_gelu(
    x, weight, bias, out, rows, inner, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x (rows, inner), weight (columns, inner) and out (rows, columns) by descriptors."""
    # Programs that run together share rows and columns: GROUP rows of tiles at a time.
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * across)
    m, n = (group * GROUP + inside % height) * ROWS, (inside // height) * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, tl.cdiv(inner, INNER), num_stages=STAGES):
        total = tl.dot(x.load([m, k * INNER]), weight.load([n, k * INNER]).T, total)
    # Written by quarters, which take less shared memory and fewer registers than the whole.
    left, right = _halves(total, ROWS, COLUMNS)
    first, second = _halves(left, ROWS, COLUMNS // 2)
    third, fourth = _halves(right, ROWS, COLUMNS // 2)
    _write_gelu(first, bias, out, m, n, columns, COLUMNS // 4)
    _write_gelu(second, bias, out, m, n + COLUMNS // 4, columns, COLUMNS // 4)
    _write_gelu(third, bias, out, m, n + COLUMNS // 2, columns, COLUMNS // 4)
    _write_gelu(fourth, bias, out, m, n + 3 * COLUMNS // 4, columns, COLUMNS // 4)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_gelu` of x `(..., K)` and weight `(N, K)` is made here instead of by the library and a pass.

    By its sizes, its dtype, and whether descriptors can tell where both lie.
    """
    columns, inner = weight.shape
    if x.dtype not in DTYPES or inner > LONGEST_SUM or x.numel() * columns < LEAST:
        return False
    steps = (inner * x.itemsize, columns * x.itemsize, x.data_ptr(), weight.data_ptr())
    return all(step % _ALIGNMENT == 0 for step in steps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """-> the GELU of `linear(x, weight, bias)`, `(..., N)` like x.

    x `(..., K)` and weight `(N, K)` contiguous, bias `(N,)`; rows of x, weight and the output are multiples of 16
    bytes.
    """
    columns, inner = weight.shape
    flat = x.view(-1, inner)
    rows = flat.shape[0]
    out = x.new_empty(*x.shape[:-1], columns)
    _linear_gelu[(ceil_div(rows, TILE_ROWS) * ceil_div(columns, TILE_COLUMNS),)](
        _described(flat, TILE_ROWS, TILE_INNER), _described(weight, TILE_COLUMNS, TILE_INNER), bias,
        _described(out.view(rows, columns), TILE_ROWS, TILE_COLUMNS // 4), rows, inner, columns,
        ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, INNER=TILE_INNER, GROUP=GROUP, STAGES=STAGES,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix that is read or written by tiles of rows x columns."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
