"""Each kernel beside its twin in float64, on inputs drawn anew: for the interpreter's tests and for the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dico_ray.models.kernels import activation, adaln, depthwise, plain, product, tiles
from dico_ray.models.layers import Block

Shape = tuple[int, int, int, int]


class Inputs(NamedTuple):
    """Random tensors of one kind; `like` gives activations, `vectors` slices of one modulation `(B, nC)`."""

    shape: Shape
    dtype: torch.dtype
    device: str

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.device, self.dtype)

    def like(self) -> Tensor:
        return self.draw(*self.shape)

    def vectors(self, count: int) -> tuple[Tensor, ...]:
        return self.draw(self.shape[0], count * self.shape[-1]).chunk(count, dim=-1)


def gradients(twin: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], d_outputs: list[Tensor]) -> list[Tensor]:
    """The twin's outputs, then its gradients by every input, in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs = twin(*exact)
    found = torch.autograd.grad(outputs, exact, [d.double() for d in d_outputs])
    return [*(output.detach() for output in outputs), *found]


def compare(found: list[Tensor | None], expected: list[Tensor], tolerance: float) -> None:
    """Largest relative error in the Euclidean norm, tensor by tensor."""
    for place, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert have is not None
        assert have.shape == want.shape
        error = float((have.double() - want).norm() / want.norm().clamp_min(1e-6))
        assert error < tolerance, f"tensor {place}: relative error {error:.2e}"


def norm(i: Inputs, tolerance: float) -> None:
    x, (shift, scale), d_stream, d_normed = i.like(), i.vectors(2), i.like(), i.like()
    out = adaln.norm_modulate(x, shift, scale)
    back = adaln.norm_modulate_backward(d_stream, d_normed, x, out.stats, shift, scale)
    exact = gradients(lambda x, a, b: (x, plain.layer_norm_modulate(x, a, b)), [x, shift, scale], [d_stream, d_normed])
    compare([x, out.normed, back.stream, back.shift, back.scale], exact, tolerance)
    compare([back.normed], exact[1:2], tolerance)
    alone = adaln.norm_modulate_backward(None, d_normed, x, out.stats, shift, scale)
    exact = gradients(lambda x, a, b: (plain.layer_norm_modulate(x, a, b),), [x, shift, scale], [d_normed])
    compare([out.normed, alone.stream, alone.shift, alone.scale], exact, tolerance)


def residual(i: Inputs, tolerance: float) -> None:
    x, branch, (gate,), d_out = i.like(), i.like(), i.vectors(1), i.like()
    out = adaln.residual(x, branch, gate)
    back = adaln.residual_backward(d_out, branch, gate)
    exact = gradients(lambda x, y, g: (plain.gated_residual(x, y, g),), [x, branch, gate], [d_out])
    compare([out, d_out, back.branch, back.gate], exact, tolerance)
    compare([back.total], [d_out.double().sum((1, 2))], tolerance)


def residual_norm(i: Inputs, tolerance: float) -> None:
    x, branch, (gate, shift, scale), d_stream, d_normed = i.like(), i.like(), i.vectors(3), i.like(), i.like()
    out = adaln.residual_norm_modulate(x, branch, gate, shift, scale)
    back = adaln.residual_norm_modulate_backward(d_stream, d_normed, out.stream, out.stats, branch, gate, shift, scale)

    def twin(x: Tensor, y: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        stream = plain.gated_residual(x, y, g)
        return stream, plain.layer_norm_modulate(stream, a, b)

    exact = gradients(twin, [x, branch, gate, shift, scale], [d_stream, d_normed])
    found = [out.stream, out.normed, back.stream, back.branch, back.gate, back.shift, back.scale]
    compare(found, exact, tolerance)
    compare([back.normed, back.total], [exact[1], exact[2].sum((1, 2))], tolerance)


def convolution(i: Inputs, tolerance: float) -> None:
    channels = i.shape[-1]
    x, weight, bias, d_pre = i.like(), i.draw(channels, 1, 3, 3), i.draw(channels), i.like()
    pre, pooled = depthwise.forward(x, weight, bias)
    back = depthwise.backward(d_pre, x, weight)
    exact = gradients(lambda *a: plain.depthwise(*a)[:1], [x, weight, bias], [d_pre])
    compare([pre, back.x, back.weight, back.bias], exact, tolerance)
    means = plain.depthwise(x.double(), weight.double(), bias.double())[1]
    compare([pooled, back.x_sum], [means, exact[1].sum((0, 1, 2))], 10 * tolerance)  # sums that nearly cancel


def gelu(i: Inputs, tolerance: float) -> None:
    x, d_out = i.like(), i.like()
    d_x, total, again = activation.gelu_backward(d_out, x)
    exact = gradients(lambda x: (F.gelu(x),), [x], [d_out])
    compare([activation.gelu(x), d_x], exact, tolerance)
    compare([again, total], [exact[0], exact[1].sum((0, 1, 2))], 10 * tolerance)
    alone, _, none = activation.gelu_backward(d_out, x, again=False)
    assert none is None
    assert torch.equal(alone, d_x)


def attention(i: Inputs, tolerance: float) -> None:
    pre, (scale,), d_out, (d_pooled,) = i.like(), i.vectors(1), i.like(), i.vectors(1)
    d_scale, again = activation.gelu_scale_backward_scale(d_out, pre, scale)
    d_pre = activation.gelu_scale_backward(d_out, pre, scale, d_pooled)

    def twin(pre: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return plain.gelu_scale(pre, scale), F.gelu(pre).sum((1, 2))

    exact = gradients(twin, [pre, scale], [d_out, d_pooled])
    found = activation.gelu_scale(pre, scale)
    compare([found, d_pre, d_scale], [exact[0], exact[2], exact[3]], tolerance)
    compare([again], exact[:1], tolerance)


def gelu_product(i: Inputs, tolerance: float) -> None:
    """Sizes rounded up to what descriptors take."""
    *images, channels = i.shape
    inner, columns = tiles.ceil_div(channels, 8) * 8, tiles.ceil_div(3 * channels, 8) * 8
    x, weight, bias = i.draw(*images, inner), i.draw(columns, inner, scale=inner**-0.5), i.draw(columns)
    wide = F.linear(x.double(), weight.double(), bias.double())
    compare([product.linear_gelu(x, weight, bias)], [F.gelu(wide)], tolerance)


def make_block(i: Inputs, ratio: int) -> Block:
    made = Block(i.shape[-1], ratio)
    for parameter in made.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data = i.draw(*parameter.shape, scale=scale)
    return made


def block(i: Inputs, tolerance: float, ratio: int = 2) -> None:
    """The block as the model calls it: output, and the gradient of every input and weight."""
    made = make_block(i, ratio)
    x, condition, d_out = i.like(), i.draw(i.shape[0], i.shape[-1]), i.like()
    results = []
    for dtype, fused, keep_gelu in ((i.dtype, True, True), (i.dtype, True, False), (torch.float64, False, False)):
        made = made.to(dtype)
        made.fused, made.keep_gelu = fused, keep_gelu
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, condition)]
        out = made(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, [*inputs, *made.parameters()], d_out.to(dtype))])
        with torch.no_grad():
            compare([made(*inputs)], [out.double()], tolerance)
    compare(results[0], results[2], tolerance)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


CASES = {
    "norm": norm, "residual": residual, "residual_norm": residual_norm, "convolution": convolution, "gelu": gelu,
    "attention": attention, "gelu_product": gelu_product, "block": block,
}  # fmt: skip
