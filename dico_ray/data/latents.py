"""The autoencoder between pixels and latents, a real diffusers `AutoencoderKL`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dico_ray.config import ConfigError, UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Mean and log variance (B, 2C, H, W), standard normal noise (B, C, H, W) -> latents (B, C, H, W), all scaled."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (log_variance / 2).exp() * noise


def fill_up(batch: Tensor, rows: int) -> Tensor:
    """A batch (B, ...) with its last row repeated until it has so many rows; strides, which compiled code is made for,
    stay the batch's own."""
    if len(batch) >= rows:
        return batch
    filled = batch.new_empty_strided((rows, *batch.shape[1:]), batch.stride())
    filled[: len(batch)] = batch
    filled[len(batch) :] = batch[-1]
    return filled


def _load(kind: Any, path: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    return kind.from_pretrained(
        path, torch_dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
    )


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> uint8 pixels [0, 255] (B, h f, w f, 3), truncated as ADM's samples are.

    vae: a diffusers `AutoencoderKL`, on whose device and in whose dtype it is computed. Raises UserError if that is
    float16 and the values went beyond it.
    """
    images = vae.decode(latents.to(vae.device, vae.dtype) / float(vae.config["scaling_factor"])).sample
    if images.dtype == torch.float16 and not images.isfinite().all():
        raise UserError("codec.precision: fp16, but decoding passed its largest number; take bf16")
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class ChannelwiseGroupNorm(nn.GroupNorm):
    """The same norm by sums over each channel's pixels, `(B, C, ...)` -> the same: for compiled channels-last networks.

    Group by group, a few neighbouring channels of each pixel are read at a time, and most of each memory access is not
    for that group. By channels, whole rows are read, and the groups are put together from `(B, C)` numbers. In float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, pixels = input.float(), tuple(range(2, input.ndim))
        # Variances, not squares: those would lose all digits where a group's mean is large beside its deviation.
        spread, middle = torch.var_mean(x, pixels, correction=0)
        spread, middle = (m.view(len(input), self.num_groups, -1) for m in (spread, middle))
        between, mean = torch.var_mean(middle, 2, correction=0, keepdim=True)
        rstd = (spread.mean(2, keepdim=True) + between + self.eps).rsqrt()
        scale = rstd.expand(-1, -1, self.num_channels // self.num_groups).flatten(1) * self.weight.float()
        shift = self.bias.float() - mean.expand(-1, -1, self.num_channels // self.num_groups).flatten(1) * scale
        shape = (*scale.shape, *(1 for _ in pixels))
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


def _weights_hash(vae: Any) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


class Autoencoder:
    """uint8 pixels (B, H, W, 3) <-> scaled latents (B, C, H/f, W/f) of about unit variance.

    The scale is the autoencoder's own `scaling_factor` (0.18215 for Stable Diffusion's).
    """

    def __init__(self, path: str, precision: str, device: torch.device, compiled: bool = False) -> None:
        """path: a folder or a hub id. compiled: by torch.compile, at the first use of each batch size.

        Raises ConfigError if nothing loads from the path, or a local folder is absent.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"codec.vae: {path} is not a folder; name a diffusers AutoencoderKL folder or a hub id")
        try:
            settings: Any = AutoencoderKL.load_config(path)
            vae, loaded = _load(AutoencoderKL, path, torch.float32)
        except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"codec.vae: cannot load an AutoencoderKL from {path!r}: {reason}") from None
        if settings.get("_class_name") != "AutoencoderKL":
            raise ConfigError(
                f"codec.vae: {path} holds a {settings.get('_class_name')}, not an AutoencoderKL; name another"
            )
        if loaded["missing_keys"]:  # diffusers fills them with random numbers
            raise ConfigError(
                f"codec.vae: the weights in {path} lack {len(loaded['missing_keys'])} tensors, among them "
                f"{sorted(loaded['missing_keys'])[0]}; copy the file again"
            )
        # cuDNN's fast convolutions take channels last; with NCHW weights it would turn each layer's input around.
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        self._hash = _weights_hash(vae)  # before they are rounded: the same for any precision
        self._vae = vae.to(device, _DTYPES[precision], memory_format=layout).eval().requires_grad_(False)
        self._compiled, self._largest = compiled, 0
        if compiled:
            for module in self._vae.modules():
                if type(module) is nn.GroupNorm and module.affine:
                    module.__class__ = ChannelwiseGroupNorm
            self._vae.encoder.compile(dynamic=False)
            self._vae.decoder.compile(dynamic=False)
        self._device, self._dtype = device, _DTYPES[precision]
        self.scale = float(vae.config["scaling_factor"])
        self.channels = int(vae.config["latent_channels"])
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.path = path

    def _whole(self, batch: Tensor) -> Tensor:
        """A batch as the network takes it: a compiled one is made for each size, so it gets the largest size yet."""
        if not self._compiled:
            return batch
        self._largest = max(self._largest, len(batch))
        return fill_up(batch, self._largest)

    @property
    def network(self) -> Any:
        """The diffusers `AutoencoderKL`."""
        return self._vae

    def describe(self) -> dict[str, Any]:
        """What a manifest or result says of the codec; the hash is of all weights."""
        return {"vae": self.path, "hash": self._hash, "scale": self.scale, "factor": self.factor}

    def to_device(self, values: np.ndarray) -> Tensor:
        """An array as a tensor there; the host does not wait for what the device is at."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray | Tensor) -> Tensor:
        """uint8 pixels [0, 255] (B, H, W, 3) -> moments of their scaled latents (B, 2C, H/f, W/f) float32.

        The first C channels are the posterior's mean, the others the logarithm of its variance (arXiv 1312.6114).
        """
        there = pixels if isinstance(pixels, Tensor) else self.to_device(pixels)
        # Rounded once: in bf16, a quotient of up to 2 would lose half a grey level before the 1 is taken from it.
        images = (there.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self._dtype)
        posterior = self._vae.encode(self._whole(images)).latent_dist
        log_variance = posterior.logvar.float() + 2 * math.log(self.scale)
        return torch.cat([posterior.mean.float() * self.scale, log_variance], dim=1)[: len(pixels)]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> uint8 pixels [0, 255] (B, h f, w f, 3), truncated as ADM's samples are."""
        return decode(self._vae, self._whole(latents))[: len(latents)]
