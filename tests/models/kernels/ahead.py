"""Compiles every launch of the kernels for an H100 without one: what the block asks for, at a model's real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dico_ray.models.kernels import block as operators

H100 = GPUTarget("cuda", 90, 32)
_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Compiled(list[tuple[str, Any]]):
    """Takes the place of Triton's launches: (kernel, compiled for the target), once for each kind of launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._known: set[Any] = set()
        monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda kernel, *a, **k: self._launch(kernel, *a, **k))

    def _launch(
        self,
        kernel: Any,
        *arguments: Any,
        grid: Any,
        warmup: bool,
        num_warps: int,
        maxnreg: int | None = None,
        **flags: Any,
    ) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | flags
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value = given[name]
            if value is None or kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
            else:
                signature[name] = _type(value)
                if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                    attributes[(place,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, str(signature), str(constants), num_warps, maxnreg)
        if key not in self._known:
            self._known.add(key)
            source = ASTSource(kernel, signature, constants, attributes)
            name = f"{kernel.fn.__module__.rsplit('.')[-1]}.{kernel.__name__} {constants}"
            options = {"num_warps": num_warps, "maxnreg": maxnreg}
            self.append((name, triton.compile(source, target=H100, options=options)))


def _type(value: Tensor | TensorDescriptor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "i32" if isinstance(value, int) else "fp32"


def launch_all(shape: tuple[int, int, int, int], ratio: int, dtype: torch.dtype) -> None:
    """Forward and backward of a block, and of the head's norm, on tensors without values."""
    images, _, _, channels = shape

    def empty(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    c, wide = channels, ratio * channels
    shapes = ((c, c, 1, 1), (c, 1, 3, 3), (c, c, 1, 1), (c, c, 1, 1), (wide, c, 1, 1), (c, wide, 1, 1))
    weights = [tensor for size in shapes for tensor in (empty(*size), empty(size[0]))]
    x, modulation = empty(*shape), empty(images, 6 * c)
    for keep_gelu in (False, True):
        _, *kept = operators.block._init_fn(x, modulation, weights, keep_gelu)
        operators.block_backward._init_fn(x, x, modulation, weights, kept)
    operators.block_inference._init_fn(x, modulation, weights)
    _, stats = operators.norm_modulate._init_fn(x, modulation[:, : 2 * c])
    operators.norm_modulate_backward._init_fn(x, x, modulation[:, : 2 * c], stats)
