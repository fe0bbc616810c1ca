"""Bytes that autograd keeps of the network between the forward and the backward pass, from its sizes alone.

One row of `PATHS` tells what a block keeps. Both are read off the network: tests count the very tensors, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from dico_ray.arithmetic import stage_widths
from dico_ray.config import Config, Model

FEATURES = 256  # sinusoids of a timestep
_STATISTIC = 4  # bytes of a LayerNorm's mean or reciprocal deviation: fp32 beside bf16 activations too, on GPUs
_LABEL = 8  # bytes of a label
_NORMS = 2  # LayerNorms of a block
_STATISTICS = 2  # of a LayerNorm, a pixel


@dataclass(frozen=True)
class Saved:
    """What a block of C channels keeps for its backward pass, its input among it, parameters not.

    maps: tensors of C values a pixel. hidden: tensors of ffn_ratio x C values a pixel.
    vectors: values an image, in C: adaLN's six and what is computed from them, means and gates of the attention.
    head_maps, head_vectors: the same of the head, beside its input and its condition, in its own width.
    """

    maps: int
    hidden: int
    vectors: int
    head_maps: int
    head_vectors: int


PATHS: dict[str, Saved] = {
    # Input, normalised, modulated, both convolutions', GELU's, the attention's and the third product's output; of the
    # feed-forward half: input, normalised, modulated, last product's output; hidden: before and after GELU.
    # The head: normalised and modulated; SiLU and 1 + scale.
    "eager":    Saved(maps=12, hidden=2, vectors=11, head_maps=2, head_vectors=2),
    # Compiled blocks compute the normalised values, the first GELU and the second half's input anew.
    "compiled": Saved(maps=8,  hidden=2, vectors=11, head_maps=2, head_vectors=2),
    # Fused kernels: input, the depthwise convolution's input and output, both branches, the stream between the halves;
    # hidden: before GELU. The head: modulated.
    "fused":    Saved(maps=6,  hidden=1, vectors=9,  head_maps=1, head_vectors=3),
    # The same with the feed-forward GELU kept (train.recompute_gelu false).
    "fused, GELU kept": Saved(maps=6, hidden=2, vectors=9, head_maps=1, head_vectors=3),
}  # fmt: skip


def path_of(config: Config, stage: int) -> str:
    """The row of `PATHS` that a run takes on GPUs: fused by setting, else compiled, but not at ZeRO stage 3."""
    if config.model.kernels != "torch":
        return "fused" if config.train.recompute_gelu else "fused, GELU kept"
    return "compiled" if config.train.compile and stage < 3 else "eager"


def activation_bytes(model: Model, path: str, value: int, recompute: bool = False) -> int:
    """Of one image: kept when the forward pass ends.

    path: a row of `PATHS`. value: bytes of one number of the network's arithmetic (2 for bf16, 4 for fp32).
    recompute: blocks keep their input alone, and one at a time is computed again in the backward pass; the largest
    one's activations count.
    """
    ratio, depths = model.architecture.ffn_ratio, model.architecture.depths
    blocks = [block_bytes(width, ratio, area, path, value) for width, area in _stages(model)]
    around = _around(model, PATHS[path], value)
    if not recompute:
        return around + sum(depth * block for depth, block in zip(depths, blocks, strict=True))
    inputs = sum(depth * width * area for depth, (width, area) in zip(depths, _stages(model), strict=True))
    return around + inputs * value + max(blocks)


def working_bytes(model: Model, value: int) -> int:
    """Of one image: gradients that the backward pass holds while all activations are still kept.

    That is at its beginning, in the head: two tensors of the last stage's width at full resolution. Further on it
    frees more than it takes.
    """
    width, area = _stages(model)[-1]
    return 2 * width * area * value


def _stages(model: Model) -> list[tuple[int, int]]:
    """Channels and pixels of the five stages."""
    full = model.latent_size**2
    areas = (full, full // 4, full // 16, full // 4, full)
    return list(zip(stage_widths(model.architecture), areas, strict=True))


def block_bytes(width: int, ffn_ratio: int, area: int, path: str, value: int) -> int:
    """What one block of `width` channels keeps of one image of `area` pixels; its condition, which all share, not."""
    saved = PATHS[path]
    numbers = width * area * (saved.maps + saved.hidden * ffn_ratio) + saved.vectors * width
    return numbers * value + _NORMS * _STATISTICS * area * _STATISTIC


def _around(model: Model, saved: Saved, value: int) -> int:
    """Embedders, input convolution, resampling, joins and head."""
    d, full, half = model.architecture.hidden_size, model.latent_size**2, model.latent_size**2 // 4
    widths = (d, 2 * d, 4 * d)
    conditions = FEATURES + sum(3 * width for width in widths)  # two layers' activations, and their sum with the label
    ends = sum(width * area for width, area in _stages(model))  # each stage's output: the next convolution's input
    joins = 4 * d * half + 2 * d * full  # concatenated with the skips
    head = 2 * d * (saved.head_maps * full + saved.head_vectors)
    numbers = conditions + model.in_channels * full + ends + joins + head
    return numbers * value + _STATISTICS * full * _STATISTIC + _LABEL
