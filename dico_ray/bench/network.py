"""What `dico-ray bench train` and `bench forward` share: the ways to run the network, and how each is timed.

All ways get the same weights and the same inputs in one run; one that does not fit into memory, or cannot run on the
device, has a row that says so.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from json import dumps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dico_ray.arithmetic import forward_macs
from dico_ray.bench.released import PlainDiCo
from dico_ray.bench.rival import DiT, forward_flops
from dico_ray.config import Config, ConfigError
from dico_ray.models import DiCo, compile_blocks, graph_stages, use_kernels
from dico_ray.storage import Storage
from dico_ray.training.meter import peak_flops

RIVAL = "DiT-XL/2"
VARIANTS = {  # what is measured in training and in the forward pass, in the words of the package's measured figures
    "released": ("training, released network, TF32 convolutions", "forward, released network, TF32 convolutions"),
    "eager": ("training, bare loop, layer by layer", "forward, bf16, layer by layer"),
    "compiled": ("training, bare loop, blocks compiled", "forward, bf16, blocks compiled"),
    "fused": ("training, bare loop, blocks fused", "forward, bf16, blocks fused"),
    "graphed": ("training, bare loop, blocks fused, CUDA graphs", "forward, bf16, blocks fused, CUDA graphs"),
    "engine": ("", ""),  # its row tells it: it depends on the settings
    "rival": ("training, bf16, blocks compiled", "forward, bf16, blocks compiled"),
}  # fmt: skip
_SEARCHES = 3
_AWAKE = 0.02  # added to weights: a fresh network's gates are zero, and would hide differences


class Inputs(NamedTuple):
    """Random, from the run's seed. x, noise `(B, C, H, W)`; t, y `(B,)`."""

    x: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor


def check_variants(names: list[str], without: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for a name that is not among VARIANTS, or is among those that this bench goes without."""
    known = [name for name in VARIANTS if name not in without]
    for name in names:
        if name not in known:
            raise ConfigError(f"--variants {name}: take some of {', '.join(known)}")


def make_inputs(config: Config, device: torch.device, batch: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(config.run.seed)
    model = config.model
    shape = (batch, model.in_channels, model.latent_size, model.latent_size)
    x, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    t, y = (
        torch.randint(stop, (batch,), generator=generator, device=device) for stop in (1000, model.num_classes)
    )  # fmt: skip
    return Inputs(x, noise, t, y)


def make_network(variant: str, config: Config, device: torch.device) -> nn.Module:
    """One of VARIANTS, in bf16 on GPUs (the released way in fp32) and in fp32 on CPUs.

    Raises ConfigError if it cannot run on the device.
    """
    dtype = torch.bfloat16 if device.type == "cuda" and variant != "released" else torch.float32
    if variant == "rival":
        torch.manual_seed(config.run.seed)
        with device:
            rival = DiT(config.model)
        rival.to(dtype).compile_blocks()
        return rival
    network = make_dico(config, device).to(dtype)
    if variant in ("fused", "graphed"):
        use_kernels(network, "triton", device, recompute_gelu=config.train.recompute_gelu)
    if variant == "graphed":
        if device.type != "cuda":
            raise ConfigError(f"--variants graphed: CUDA graphs need a GPU, and the network is on {device.type}")
        graph_stages(network, lend_gradients=True)
    elif variant == "compiled":
        compile_blocks(network)
    return PlainDiCo(network) if variant == "released" else network


def make_dico(config: Config, device: torch.device) -> DiCo:
    """The configured network with fp32 weights that are the same in every call."""
    torch.manual_seed(config.run.seed)
    sizes, model = config.model.architecture, config.model
    with device, torch.no_grad():
        network = DiCo(
            sizes.hidden_size, sizes.depths, sizes.ffn_ratio, model.num_classes, model.in_channels,
            class_dropout_prob=0.0,
        )  # fmt: skip
        awaken(network)
    return network


@torch.no_grad()
def awaken(network: nn.Module) -> None:
    """Moves every weight a little, since a part of the initial ones is zero: a GPU computes with zeros faster."""
    for parameter in network.parameters():
        parameter += _AWAKE * torch.randn_like(parameter)


def image_flops(variant: str, config: Config) -> float:
    """Of one image's forward pass."""
    return forward_flops(config.model) if variant == "rival" else 2 * forward_macs(config.model)


def seconds_of(call: Callable[[], Any], device: torch.device, least: float) -> float:
    """Mean seconds of a call over at least `least` seconds, the device's work waited for at both ends."""

    def timed(count: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        return (time.perf_counter() - began) / count

    return timed(max(1, math.ceil(least / timed(1))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(variant: str, config: Config, device: torch.device, batch: int, rate: float, flops: float) -> dict[str, Any]:
    """A variant's figures. rate: images/s; flops: of an image."""
    peak = peak_flops(device)
    gpu = device.type == "cuda"
    return {
        "variant": variant, "model": RIVAL if variant == "rival" else config.model.name, "micro_batch": batch,
        "images_per_s": rate, "tflops": rate * flops / 1e12, "mfu": rate * flops / peak if peak else None,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None,
    }  # fmt: skip


def each_way(
    config: Config, device: torch.device, variants: list[str], batches: list[int],
    measure: Callable[[str, int, Tensor], dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """measure(variant, micro-batch, the plain network's output at batch 2) -> a row, for each of them, printed."""
    if config.resources.threads:
        torch.set_num_threads(config.resources.threads)
    expected = output(make_network("released", config, device), make_inputs(config, device, 2))
    rows = []
    for variant in variants:
        for batch in batches:
            begin(device)
            try:
                found = measure(variant, batch, expected)
            except torch.OutOfMemoryError:
                found = {"variant": variant, "micro_batch": batch, "failed": "out of memory"}
            except ConfigError as error:
                found = {"variant": variant, "micro_batch": batch, "failed": str(error)}
            rows.append(found)
            print(line(found), flush=True)
    return rows


def begin(device: torch.device) -> None:
    """Forgets what the variant before left: compiled code, cached memory, the peak of memory.

    DeepSpeed's engine and what it holds refer to each other: they go when they are looked for. Its parameters, which
    their hooks hold, go one search later: 6 bytes of each would be counted as the next variant's.
    """
    for _ in range(_SEARCHES):
        gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def output(network: nn.Module, inputs: Inputs) -> Tensor:
    return network(inputs.x, inputs.t, inputs.y).float()


def difference(variant: str, network: nn.Module, config: Config, device: torch.device, expected: Tensor) -> Any:
    """Relative difference of the network's output from the plain one's; None for the rival."""
    if variant == "rival":
        return None
    found = output(network, make_inputs(config, device, 2))
    return float((found - expected).norm() / expected.norm())


HEADER = (f"{'variant':<10}{'batch':>6}{'images/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'GB':>7}{'first s':>9}"
          f"{'difference':>12}")  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of the table under HEADER."""
    cells = (("images_per_s", 10, ".1f"), ("tflops", 9, ".2f"), ("mfu", 7, ".1%"), ("memory_gb", 7, ".1f"),
             ("first_s", 9, ".1f"), ("difference", 12, ".1e"))  # fmt: skip
    return told(f"{found['variant']:<10}{found['micro_batch']:>6}", found, cells)


def told(start: str, found: dict[str, Any], cells: Sequence[tuple[str, int, str]]) -> str:
    """A row: how it starts, then its cells (a figure's name, width, format), or why there are none."""
    if "failed" in found:
        return f"{start}  {found['failed']}"
    values = ((found[name], width, form) for name, width, form in cells)
    return start + "".join(f"{'-' if value is None else format(value, form):>{width}}" for value, width, form in values)


def class_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a micro-batch (in training with its share of the update) by kernel class, a column a row."""
    shown = [found for found in rows if "classes" in found]
    kinds = sorted({kind for found in shown for kind in found["classes"]})
    heads = "".join(f"{found['variant'] + ' ' + str(found['micro_batch']):>14}" for found in shown)
    lines = (f"{kind:<30}" + "".join(f"{found['classes'].get(kind, 0.0):>14.2f}" for found in shown) for kind in kinds)
    return "\n".join([f"{'ms':<30}{heads}", *lines])


def finish(verb: int, rows: list[dict[str, Any]], device: torch.device, file: str) -> None:
    """Prints the classes' table and writes the figures: all rows, and on a GPU `measured`.

    verb: 0 for training, 1 for the forward pass: which of a variant's words name it.
    """
    print("\n" + class_table(rows))
    if not file:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    figures = {
        "machine": name or f"{platform.machine()}, {os.cpu_count()} CPUs", "rows": rows,
        "measured": measured(verb, rows, name) if name else [],
    }  # fmt: skip
    folder, base = os.path.split(os.path.abspath(file))
    Storage(folder).write(base, dumps(figures, indent=1).encode())


def measured(verb: int, rows: list[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """Rows in the shape of the package's measured figures. gpu: its full name."""
    common = {
        "gpu": gpu.removeprefix("NVIDIA ").split(" ")[0].split("-")[0],
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "command": " ".join(["dico-ray", *sys.argv[1:]]), "date": date.today().isoformat(),
    }  # fmt: skip
    return [
        {"model": found["model"], "what": found.get("what") or VARIANTS[found["variant"]][verb], **common,
         **{field: found[field] for field in ("micro_batch", "images_per_s", "tflops", "memory_gb")}}
        for found in rows if "failed" not in found
    ]  # fmt: skip


def device_of(config: Config) -> torch.device:
    """The GPU at hand, else the CPU, as resources.accelerator says. Raises ConfigError for a GPU that is not there."""
    if config.resources.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("resources.accelerator: gpu, but PyTorch sees none here; take auto or cpu")
    gpu = config.resources.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if gpu else torch.device("cpu")
