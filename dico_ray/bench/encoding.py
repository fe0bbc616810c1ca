"""`dico-ray bench encode`: images/s of the autoencoder by precision, layout and compilation, and how far latents move.

The first row is the released way: fp32, NCHW, nothing compiled (on GPUs PyTorch's own convolutions run in TF32). The
others are what codec.precision and codec.compile choose from. An image is encoded once here; the verb encodes it twice,
plain and mirrored. Latents are the posterior's means, compared with the first row's.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from json import dumps
from typing import Any

import numpy as np
import ray
import torch

from dico_ray import cluster
from dico_ray.bench.folders import bench_folder
from dico_ray.bench.sampling import random_autoencoder
from dico_ray.config import Config, ConfigError
from dico_ray.data.latents import Autoencoder
from dico_ray.storage import Storage

_CHOICES = ("random", "codec")
RELEASED = "released"
WAYS = {  # codec.precision and codec.compile; compiled ones are GPUs'
    f"{precision}{' compiled' if compiled else ''}": (precision, compiled)
    for compiled in (False, True)
    for precision in ("fp32", "bf16", "fp16")
}


def main(config: Config, *, verbose: bool, images: int, ways: Sequence[str], vae: str, folder: str, json: str) -> None:
    """Prints the table, for images of encode.image_size in batches of encode.batch_size.

    images: how many are encoded, timed. ways: rows besides the first, of WAYS, or "all". vae: "random" (of Stable
    Diffusion's sizes), or "codec" (codec.vae). folder: for the random one; unset: a temporary one. json: a file.
    Raises ConfigError for impossible ones.
    """
    if vae not in _CHOICES or images < 1:
        raise ConfigError(f"--vae {vae} --images {images}: vae must be random or codec, images 1 or more")
    for name in ways:
        if name not in (*WAYS, "all"):
            raise ConfigError(f"--ways {name}: take all, or some of {', '.join(WAYS)}")
    with bench_folder(folder) as place:
        path = config.codec.vae if vae == "codec" else random_autoencoder(config, Storage(f"{place}/vae"))
        cluster.connect(verbose)
        gpu = cluster.uses_gpu(config.resources)
        cluster.require_pool(config.resources.model_copy(update={"actors": 1}), gpu)
        task: Any = ray.remote(measure).options(**cluster.actor_options(config.resources, gpu))
        figures: dict[str, Any] = ray.get(task.remote(config, path, images, gpu, ways))
    _tell(figures)
    if json:
        there, name = os.path.split(os.path.abspath(json))
        Storage(there).write(name, dumps(figures, indent=1).encode())


def measure(config: Config, path: str, images: int, gpu: bool, ways: Sequence[str] = ("all",)) -> dict[str, Any]:
    """The rows, in this process."""
    cluster.quiet()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
    pixels = _pictures(min(images, config.encode.batch_size), config.encode.image_size)
    rows: dict[str, Any] = {}
    exact, released = np.zeros(0), 0.0
    for name, (precision, compiled) in {RELEASED: ("fp32", False), **WAYS}.items():
        if (compiled and not gpu) or ("all" not in ways and name not in (RELEASED, *ways)):
            continue
        autoencoder = Autoencoder(path, precision, device, compiled)
        if name == RELEASED:
            autoencoder.network.to(memory_format=torch.contiguous_format)
        rate, start_s, latents = _rate(autoencoder, pixels, images)
        if name == RELEASED:
            exact, released = latents, rate
        difference = np.abs(latents - exact)
        rows[name] = {
            "images_per_s": rate, "start_s": start_s, "ratio": rate / released,
            "difference_rms": float(np.sqrt((difference**2).mean()) / exact.std()),
            "difference_max": float(difference.max() / exact.std()),
        }  # fmt: skip
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "images": images, "image_size": config.encode.image_size, "batch_size": len(pixels), "rows": rows,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def _pictures(count: int, size: int) -> np.ndarray:
    """Smooth random pictures: uint8 (N, H, W, 3)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _rate(autoencoder: Autoencoder, pixels: np.ndarray, images: int) -> tuple[float, float, np.ndarray]:
    """Images/s from pixels to latents, of batch after batch as `encode` sends them: the host waits at the end.

    And seconds of the first batch; the latents (B, C, h, w).
    """
    began = time.perf_counter()
    latents = autoencoder.encode(pixels).cpu().numpy()[:, : autoencoder.channels]
    start_s = time.perf_counter() - began
    done, began, found = 0, time.perf_counter(), []
    while done < images:
        found.append(autoencoder.encode(pixels))
        done += len(pixels)
    torch.cat(found).cpu()
    return done / (time.perf_counter() - began), start_s, latents.astype(np.float64)


def _tell(figures: dict[str, Any]) -> None:
    size = figures["image_size"]
    print(f"\n{size}x{size} pixels, batches of {figures['batch_size']}, on {figures['device']} ({figures['machine']})")
    print(f"{'':16}{'images/s':>10}{'ratio':>8}   latents move (rms, largest, in deviations)")
    for name, row in figures["rows"].items():
        print(
            f"  {name:14}{row['images_per_s']:10.1f}{row['ratio']:8.2f}   {row['difference_rms']:.1e} "
            f"{row['difference_max']:.1e}"
        )
