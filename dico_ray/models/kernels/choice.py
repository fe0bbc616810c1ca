"""Which path a network takes: the kernels in Triton, or plain PyTorch."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from dico_ray.config import ConfigError


def choose(setting: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """model.kernels (auto, triton or torch) -> whether the kernels run, and a line that says so.

    auto: the kernels wherever they can run.

    Raises:
        ConfigError: the setting is triton, and the kernels cannot run here.
    """
    if setting == "torch":
        return False, "plain PyTorch (model.kernels torch)"
    missing = _missing(device, dtype)
    if not missing:
        return True, "Triton (fused blocks)"
    if setting == "triton":
        raise ConfigError(f"model.kernels: triton, but {missing}; take auto or torch")
    return False, f"plain PyTorch ({missing})"


def _missing(device: torch.device, dtype: torch.dtype) -> str:
    """What the kernels lack; empty: nothing."""
    if device.type != "cuda" and not interpreted():
        return f"the network is on {device.type}, not on a GPU"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the network computes in {str(dtype).removeprefix('torch.')}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels by its interpreter, on the CPU, as tests let it (set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
