"""`dico-ray bench kernels`: each Triton kernel at the shapes of the model's stages, beside the time its bytes take.

The bytes' time is that of a copy of as many bytes on the same GPU, measured in the same run. A kernel at 1.0 cannot be
made faster without moving less.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from json import dumps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dico_ray.arithmetic import stage_widths
from dico_ray.bench.network import device_of, seconds_of
from dico_ray.config import Config, ConfigError
from dico_ray.models.kernels.choice import choose
from dico_ray.storage import Storage

_COPY_BYTES = 2**30


class Pass(NamedTuple):
    """A kernel's launch. moved: activations of the stage's width that it has to read and write."""

    name: str
    moved: float
    call: Callable[[], Any]


def main(config: Config, *, verbose: bool, micro_batches: list[int], seconds: float, json: str) -> None:
    """Prints a row a kernel, stage and micro-batch; json: a file for them. Raises ConfigError without a GPU."""
    device = device_of(config)
    choose("triton", device, torch.bfloat16)
    if device.type != "cuda":
        raise ConfigError("resources.accelerator: the kernels' times mean something on a GPU alone, and here is none")
    rate = copy_rate(device, seconds)
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    rows = []
    for batch in micro_batches:
        for shape in stage_shapes(config, batch):
            for found in measure(shape, config.model.architecture.ffn_ratio, torch.bfloat16, device, seconds, rate):
                rows.append(found)
                print(line(found), flush=True)
    if json:
        folder, name = os.path.split(os.path.abspath(json))
        figures = {"gpu": torch.cuda.get_device_name(device), "copy_bytes_per_s": rate, "rows": rows}
        Storage(folder).write(name, dumps(figures, indent=1).encode())


def stage_shapes(config: Config, batch: int) -> list[tuple[int, int, int, int]]:
    """(B, H, W, C) of the stages, each once."""
    side = config.model.latent_size
    widths = stage_widths(config.model.architecture)
    sides = (side, side // 2, side // 4, side // 2, side)
    return list(dict.fromkeys((batch, s, s, width) for s, width in zip(sides, widths, strict=True)))


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes/s, read and written ones both counted."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / seconds_of(lambda: target.copy_(source), device, seconds)


def measure(
    shape: tuple[int, int, int, int], ratio: int, dtype: torch.dtype, device: torch.device, seconds: float, rate: float
) -> list[dict[str, Any]]:
    """A row for each of `passes`: microseconds, those that its bytes take at `rate` bytes/s, and the ratio."""
    nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
    rows = []
    for one in passes(shape, ratio, dtype, device):
        took, least = seconds_of(one.call, device, seconds), one.moved * nbytes / rate
        rows.append({"kernel": one.name, "shape": list(shape), "us": took * 1e6, "bytes_us": least * 1e6,
                     "times": took / least})  # fmt: skip
    return rows


def passes(shape: tuple[int, int, int, int], ratio: int, dtype: torch.dtype, device: torch.device) -> list[Pass]:
    """A block's launches, on random tensors, in the order of its forward and backward passes."""
    from dico_ray.models.kernels import activation, adaln, depthwise

    images, height, width, channels = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, y, d, n = (draw(*shape) for _ in range(4))
    u, du = (draw(images, height, width, ratio * channels) for _ in range(2))
    shift, scale, gate = draw(images, 3 * channels).chunk(3, dim=-1)
    vector, weight, bias = draw(images, channels), draw(channels, 1, 3, 3), draw(channels)
    stats = torch.rand(2, images * height * width, device=device)
    return [
        Pass("norm", 2, lambda: adaln.norm_modulate(x, shift, scale)),
        Pass("depthwise", 2, lambda: depthwise.forward(x, weight, bias)),
        Pass("gelu x attention", 2, lambda: activation.gelu_scale(x, vector)),
        Pass("residual + norm", 4, lambda: adaln.residual_norm_modulate(x, y, gate, shift, scale)),
        Pass("gelu", 2 * ratio, lambda: activation.gelu(u)),
        Pass("residual", 3, lambda: adaln.residual(x, y, gate)),
        Pass("residual backward", 3, lambda: adaln.residual_backward(d, y, gate)),
        Pass("gelu backward", 4 * ratio, lambda: activation.gelu_backward(du, u)),
        Pass("residual + norm backward", 7,
             lambda: adaln.residual_norm_modulate_backward(d, n, x, stats, y, gate, shift, scale)),
        Pass("attention backward", 3, lambda: activation.gelu_scale_backward_scale(d, x, vector)),
        Pass("gelu x attention backward", 3, lambda: activation.gelu_scale_backward(d, x, vector, vector)),
        Pass("depthwise backward", 3, lambda: depthwise.backward(d, x, weight)),
        Pass("norm backward", 5, lambda: adaln.norm_modulate_backward(d, n, x, stats, shift, scale)),
    ]  # fmt: skip


def line(found: dict[str, Any]) -> str:
    shape = "x".join(map(str, found["shape"]))
    return (f"{found['kernel']:<27}{shape:<18}{found['us']:>9.1f} us, bytes {found['bytes_us']:>8.1f} us: "
            f"{found['times']:.2f} times")  # fmt: skip
