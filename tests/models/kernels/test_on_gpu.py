from __future__ import annotations

import pytest
import torch

from tests.models.kernels import cases

pytestmark = pytest.mark.gpu


# Heights, widths and channels of DiCo-H's five stages, of DiCo-S, of 512 pixels, and none that fits a tile.
SHAPES = [(4, 32, 32, 416), (4, 16, 16, 832), (4, 8, 8, 1664), (4, 32, 32, 832), (2, 64, 64, 416), (3, 32, 32, 128),
          (3, 5, 7, 70)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", cases.CASES)
def test_a_kernel_computes_what_its_twin_does_in_float64(
    name: str, shape: cases.Shape, dtype: torch.dtype, tolerance: float
) -> None:
    if name == "gelu_product" and dtype == torch.float32:
        pytest.skip("products in fp32 are the library's")
    torch.seed()
    cases.CASES[name](cases.Inputs(shape, dtype, "cuda"), tolerance)


def test_two_runs_are_equal_bit_by_bit() -> None:
    i = cases.Inputs((8, 32, 32, 832), torch.bfloat16, "cuda")
    made = cases.make_block(i, 4)
    made.fused = True
    x, condition, d_out = i.like().requires_grad_(), i.draw(8, 832), i.like()
    first, second = (torch.autograd.grad(made(x, condition), [x, *made.parameters()], d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("images", "ratio"), [(16, 2), (16, 4)])
def test_a_pass_without_gradients_keeps_nothing(images: int, ratio: int) -> None:
    """At its peak: the stream, the norm that the wide product takes, and what that and the GELU make."""
    i = cases.Inputs((images, 32, 32, 416), torch.bfloat16, "cuda")
    made = cases.make_block(i, ratio)
    made.fused = True
    x, condition = i.like(), i.draw(images, 416)
    with torch.no_grad():
        made(x, condition)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = made(x, condition)
    assert torch.cuda.max_memory_allocated() - before < (2 * ratio + 2.5) * x.nbytes
    assert torch.cuda.memory_allocated() - before < 1.1 * x.nbytes
    assert out.shape == x.shape
