"""A whole block as one operator, forward and backward, of the kernels here and the library's matrix products.

What a block keeps for its backward pass, in values a pixel and channel, if its feed-forward half is r times as wide
(a value is 2 bytes in bf16: 20 bytes for r = 4, where the separate layers' autograd keeps 12 + 2r, 40 bytes):

    kept: input 1, convolution's input 1, pre-activation 1, first branch 1, stream between the halves 1,
          feed-forward pre-activation r, second branch 1                                          6 + r
    made again, in passes that read its source anyway: both modulated norms 2, the weighed GELU 1,
          the feed-forward GELU r                                                                 3 + r

With keep_gelu the last is kept instead, r values more, and the pass that would make it writes r less: for GPUs that
have memory to spare. The input is the output of the block before, counted once. Mean and deviation are 16 bytes a
pixel on top. The biases' gradients fall out of the passes that make the gradients which they sum.

Passes without gradients have an operator of their own, which keeps nothing. There the feed-forward GELU is done by the
product before it where `product.pays` says so, else by a pass of `activation`, as it is in training.

One operator and not one a pass: a product's input is then recomputed without being kept by the product, and the
host, which has dozens of launches a block to make, meets autograd once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dico_ray.models.kernels import activation, adaln, depthwise, product

_CONV1, _CONV2, _CONV3, _ATTENTION, _CONV4, _CONV5 = range(0, 12, 2)  # places of the weights; each's bias follows


def _linear(x: Tensor, weights: list[Tensor], place: int) -> Tensor:
    return F.linear(x, weights[place].flatten(1), weights[place + 1])


def _linear_gelu(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The GELU of conv4's product, which is not kept."""
    weight, bias = weights[_CONV4].flatten(1), weights[_CONV4 + 1]
    if product.pays(x, weight):
        return product.linear_gelu(x, weight, bias)
    return activation.gelu(F.linear(x, weight, bias))


@torch.library.custom_op("dico_ray::block_inference", mutates_args=())
def block_inference(x: Tensor, modulation: Tensor, weights: list[Tensor]) -> Tensor:
    """`block`'s first output, for passes without gradients: a tensor lives until the next one is made of it."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
    h = _linear(adaln.norm_modulate(x, shift_1, scale_1).normed, weights, _CONV1)
    h, mean = depthwise.forward(h, weights[_CONV2], weights[_CONV2 + 1])
    h = activation.gelu_scale(h, _linear(mean.to(x.dtype), weights, _ATTENTION).sigmoid())
    h = _linear(h, weights, _CONV3)
    stream, h, _ = adaln.residual_norm_modulate(x, h, gate_1, shift_2, scale_2)
    h = _linear_gelu(h, weights)
    h = _linear(h, weights, _CONV5)
    return adaln.residual(stream, h, gate_2)


@block_inference.register_fake
def _(x: Tensor, modulation: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dico_ray::block", mutates_args=())
def block(x: Tensor, modulation: Tensor, weights: list[Tensor], keep_gelu: bool) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """x `(B, H, W, C)`, modulation `(B, 6C)`: shift, scale, gate of each half -> the block's output, like x.

    weights: weight and bias of conv1 `(C, C, 1, 1)`, conv2 `(C, 1, 3, 3)`, conv3, the attention's product, conv4
    `(rC, C, 1, 1)` and conv5, all of x's dtype. The other outputs are what the backward pass needs; the last of them
    is the feed-forward half's GELU if keep_gelu, else empty.
    """
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
    _, normed, stats_1 = adaln.norm_modulate(x, shift_1, scale_1)
    h = _linear(normed, weights, _CONV1)
    pre, mean = depthwise.forward(h, weights[_CONV2], weights[_CONV2 + 1])
    pooled = mean.to(x.dtype)
    attention = _linear(pooled, weights, _ATTENTION).sigmoid()
    branch_1 = _linear(activation.gelu_scale(pre, attention), weights, _CONV3)
    middle, normed, stats_2 = adaln.residual_norm_modulate(x, branch_1, gate_1, shift_2, scale_2)
    wide = _linear(normed, weights, _CONV4)
    active = activation.gelu(wide)
    branch_2 = _linear(active, weights, _CONV5)
    out = adaln.residual(middle, branch_2, gate_2)
    active = active if keep_gelu else x.new_empty(0)
    return out, stats_1, h, pre, pooled, attention, branch_1, middle, stats_2, wide, branch_2, active


@block.register_fake
def _(x: Tensor, modulation: Tensor, weights: list[Tensor], keep_gelu: bool) -> tuple[Tensor, ...]:
    images, height, width, channels = x.shape
    stats = (2, images * height * width)
    wide = (images, height, width, weights[_CONV4].shape[0])
    return (
        torch.empty_like(x), x.new_empty(stats, dtype=torch.float32), torch.empty_like(x), torch.empty_like(x),
        x.new_empty(images, channels), x.new_empty(images, channels), torch.empty_like(x), torch.empty_like(x),
        x.new_empty(stats, dtype=torch.float32), x.new_empty(wide), torch.empty_like(x),
        x.new_empty(wide if keep_gelu else 0),
    )  # fmt: skip


def _input_gradient(d_out: Tensor, weight: Tensor) -> Tensor:
    """Of `x @ weight.T` by x, from the product's gradient `(..., C_out)`."""
    flat = weight.flatten(1)
    return (d_out.flatten(0, -2) @ flat).view(*d_out.shape[:-1], flat.shape[1])


def _weight_gradient(d_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same by the weight, in its shape."""
    return (d_out.flatten(0, -2).t() @ x.flatten(0, -2)).view(weight.shape)


@torch.library.custom_op("dico_ray::block_backward", mutates_args=())
def block_backward(
    d_out: Tensor, x: Tensor, modulation: Tensor, weights: list[Tensor], kept: list[Tensor]
) -> list[Tensor]:
    """Gradients of x, modulation and the weights, in their order and dtypes. kept: `block`'s outputs but the first."""
    stats_1, h, pre, pooled, attention, branch_1, middle, stats_2, wide, branch_2, active = kept
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)
    gradients: list[Tensor] = list(weights)

    def keep(place: int, weight: Tensor, bias: Tensor) -> None:
        # An operator's outputs may not share memory, as slices of one table of sums would.
        gradients[place], gradients[place + 1] = weight, bias.to(x.dtype, copy=True)

    end = adaln.residual_backward(d_out, branch_2, gate_2)
    assert end.branch is not None and end.total is not None
    d_active = _input_gradient(end.branch, weights[_CONV5])
    d_wide, d_bias, again = activation.gelu_backward(d_active, wide, again=not active.numel())
    active = active if again is None else again
    keep(_CONV5, _weight_gradient(end.branch, active, weights[_CONV5]), (end.total * gate_2).sum(0))
    del active, again, d_active

    mid = adaln.residual_norm_modulate_backward(
        d_out, _input_gradient(d_wide, weights[_CONV4]), middle, stats_2, branch_1, gate_1, shift_2, scale_2
    )
    assert mid.branch is not None and mid.normed is not None and mid.total is not None
    keep(_CONV4, _weight_gradient(d_wide, mid.normed, weights[_CONV4]), d_bias)
    del d_wide

    d_weighed = _input_gradient(mid.branch, weights[_CONV3])
    d_attention, weighed = activation.gelu_scale_backward_scale(d_weighed, pre, attention)
    keep(_CONV3, _weight_gradient(mid.branch, weighed, weights[_CONV3]), (mid.total * gate_1).sum(0))
    del weighed
    d_logit = d_attention * attention.float() * (1 - attention.float())
    d_low = d_logit.to(x.dtype)
    d_pooled = _input_gradient(d_low, weights[_ATTENTION])
    keep(_ATTENTION, _weight_gradient(d_low, pooled, weights[_ATTENTION]), d_logit.sum(0))
    d_pre = activation.gelu_scale_backward(d_weighed, pre, attention, d_pooled / (x.shape[1] * x.shape[2]))
    del d_weighed
    conv = depthwise.backward(d_pre, h, weights[_CONV2])
    del d_pre
    keep(_CONV2, conv.weight.to(x.dtype, copy=True), conv.bias)

    start = adaln.norm_modulate_backward(
        mid.stream, _input_gradient(conv.x, weights[_CONV1]), x, stats_1, shift_1, scale_1
    )
    assert start.stream is not None and start.normed is not None
    keep(_CONV1, _weight_gradient(conv.x, start.normed, weights[_CONV1]), conv.x_sum)
    parts = (start.shift, start.scale, mid.gate, mid.shift, mid.scale, end.gate)
    d_modulation = torch.cat([part for part in parts if part is not None], dim=-1).to(x.dtype)
    return [start.stream, d_modulation, *gradients]


@block_backward.register_fake
def _(d_out: Tensor, x: Tensor, modulation: Tensor, weights: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, modulation, *weights)]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, modulation, weights, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, modulation, *weights, *output[1:])
    ctx.weights = len(weights)  # pyright: ignore[reportAttributeAccessIssue]


def _backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor, *_: Tensor | None) -> tuple:
    x, modulation, *rest = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    count: int = ctx.weights  # pyright: ignore[reportAttributeAccessIssue]
    d_x, d_modulation, *d_weights = block_backward(d_out.contiguous(), x, modulation, rest[:count], rest[count:])
    return d_x, d_modulation, d_weights, None


block.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("dico_ray::norm_modulate", mutates_args=())
def norm_modulate(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The head's: x `(B, H, W, C)`, modulation `(B, 2C)`, shift and scale -> like x; and statistics for backward."""
    _, normed, stats = adaln.norm_modulate(x, *modulation.chunk(2, dim=-1))
    return normed, stats


@norm_modulate.register_fake
def _(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("dico_ray::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(d_normed: Tensor, x: Tensor, modulation: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and modulation."""
    shift, scale = modulation.chunk(2, dim=-1)
    found = adaln.norm_modulate_backward(None, d_normed, x, stats, shift, scale)
    assert found.stream is not None and found.shift is not None and found.scale is not None
    return found.stream, torch.cat([found.shift, found.scale], dim=-1).to(modulation.dtype)


@norm_modulate_backward.register_fake
def _(d_normed: Tensor, x: Tensor, modulation: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(modulation)


def _save_norm(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward_norm(ctx: torch.autograd.function.FunctionCtx, d_normed: Tensor, _: Tensor | None) -> tuple:
    x, modulation, stats = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    return norm_modulate_backward(d_normed.contiguous(), x, modulation, stats)


norm_modulate.register_autograd(_backward_norm, setup_context=_save_norm)
