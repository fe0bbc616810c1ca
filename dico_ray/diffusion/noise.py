"""Counter-based random draws: a value depends on (seed, stream, step, row, element) and on nothing else.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
key is the 64-bit seed, low half first. The counter's four words are

    c0  block of four elements within the row
    c1  global row number: a sample's place in the global batch, or its index in an evaluation
    c2  step, low 32 bits
    c3  stream, plus bits 32 .. 47 of the step in the upper 16

so a rank draws just its own rows, in any order, on any device, and gets the bits a single process would get.
Uniform and normal values follow Triton's `tl.rand4x` and `tl.randn4x`, for which this is the plain PyTorch
twin. Words are exact everywhere; normals may differ in the last places, since logarithms and cosines do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
# Just below 2**-31, so that the largest value stays below 1 in float32.
UNIFORM_SCALE = 4.6566127342e-10
LEAST_UNIFORM = 1e-7

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Stream(IntEnum):
    """What a draw is for. Two streams never share a value."""

    TIMESTEP = 0
    NOISE = 1
    LABEL_DROP = 2
    SAMPLE_START = 3
    SAMPLE_STEP = 4
    SAMPLE_LABEL = 5
    POSTERIOR = 6
    TRAIN_POSTERIOR = 7
    VALIDATION_TIMESTEP = 16
    VALIDATION_NOISE = 17
    VALIDATION_POSTERIOR = 18


def normal(seed: int, stream: Stream, step: int, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal values, by Box and Muller's transform.

    Args:
        seed: in [0, 2**64).
        stream: what the draw is for.
        step: in [0, 2**48), the training or sampling step.
        rows: int64 `(B,)`, global row numbers in [0, 2**32), on the device that is to hold the result.
        shape: shape of one row's values.

    Returns:
        float32 `(B, *shape)`.

    Raises:
        ValueError: seed or step outside its range.
    """
    elements = math.prod(shape)
    words = _draw(seed, stream, step, rows, blocks=-(-elements // 4))
    u0, u1, u2, u3 = (_uniform(word) for word in words)
    values = torch.stack([*_box_muller(u0, u1), *_box_muller(u2, u3)], dim=-1)
    return values.flatten(1)[:, :elements].reshape(len(rows), *shape)


def integers(seed: int, stream: Stream, step: int, rows: Tensor, high: int) -> Tensor:
    """Whole numbers in [0, high), one a row: int64 `(B,)`. Other arguments as in `normal`.

    The bias of `(word * high) >> 32` is at most high / 2**32.

    Raises:
        ValueError: seed or step outside its range, or high outside 1 .. 2**31 - 1.
    """
    if not 1 <= high < 2**31:
        raise ValueError(f"high is {high}; it must be from 1 to {2**31 - 1}")
    return (_word(seed, stream, step, rows) * high) >> 32


def bernoulli(seed: int, stream: Stream, step: int, rows: Tensor, p: float) -> Tensor:
    """True with probability p, one a row: bool `(B,)`. Other arguments as in `normal`.

    Raises:
        ValueError: seed or step outside its range, or p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; a probability lies between 0 and 1")
    # Whole numbers are compared, not float32 values: exact on every device, never at p = 0, always at p = 1.
    return _word(seed, stream, step, rows) < round(p * 2**32)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> Words:
    """Philox-4x32-10 of counters and a key, all words in [0, 2**32), held in int64 tensors that broadcast."""
    for _ in range(ROUNDS):
        # int64 products wrap around: their 64 bits are right though their sign is not, hence the masks.
        product_0, product_2 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_2
        c0 = ((product_2 >> 32) & MASK) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = product_2 & MASK, product_0 & MASK
        k0, k1 = (k0 + KEY_STEP_0) & MASK, (k1 + KEY_STEP_1) & MASK
    return c0, c1, c2, c3


def _word(seed: int, stream: Stream, step: int, rows: Tensor) -> Tensor:
    """One word a row: `(B,)`."""
    return _draw(seed, stream, step, rows, blocks=1)[0][:, 0]


def _draw(seed: int, stream: Stream, step: int, rows: Tensor, blocks: int) -> Words:
    """The four words of each block of each row, `(B, blocks)` apiece."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**64 - 1")
    if not 0 <= step < 2**48:
        raise ValueError(f"step is {step}; it must be from 0 to 2**48 - 1")
    c0 = torch.arange(blocks, dtype=torch.int64, device=rows.device).expand(len(rows), blocks)
    c1 = rows.to(torch.int64)[:, None]
    c2 = torch.full_like(c1, step & MASK)
    c3 = torch.full_like(c1, int(stream) | (step >> 32) << 16)
    return philox(c0, c1, c2, c3, seed & MASK, seed >> 32)


def _uniform(word: Tensor) -> Tensor:
    """Words in [0, 2**32) -> float32 in [0, 1): Triton's `uint_to_uniform_float`."""
    folded = torch.where(word > 0x7FFFFFFF, MASK - word, word)
    return folded.to(torch.float32) * UNIFORM_SCALE


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two uniform values -> two normal ones: Triton's `pair_uniform_to_normal`.

    The logarithm and the circle are taken in float64: in float32 the vectorised and the scalar code of a CPU
    may differ in the last place, and a value would depend on where in the tensor it lies.
    """
    angle = (2 * math.pi * v).double()
    radius = (-2 * u.clamp(min=LEAST_UNIFORM).double().log()).sqrt()
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
