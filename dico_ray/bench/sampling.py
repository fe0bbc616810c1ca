"""`dico-ray bench sample`: images/s of generation, the released way and this one's, in one run on one device.

The released way: fp32 (products and convolutions in TF32 on GPUs, as its own convolutions run), NCHW, nothing
compiled, ADM's sampler, batches of 32 decoded whole, then PNG files written one after the other while the device
waits. Its judging pass over the files afterwards is `bench evaluate`'s, and not in its rate.

Ours is timed whole, both as `sample` (PNG files) and as `evaluate` runs it (features and statistics of each image
where it is made, of an untrained Inception). A batch is also timed phase by phase, with the device waited for in
between, and so is the network alone: the share of its rate that the whole reaches is what sampler, decoding, features,
statistics and host leave of it.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from json import dumps
from pathlib import Path
from typing import Any

import ray
import torch

from dico_ray import cluster, pool, weight_files
from dico_ray.arithmetic import parameter_count
from dico_ray.bench.evaluate import untrained
from dico_ray.bench.folders import bench_folder
from dico_ray.bench.network import awaken
from dico_ray.bench.released import PlainDiCo
from dico_ray.config import Config, ConfigError
from dico_ray.data.generated import to_png
from dico_ray.data.latents import Autoencoder
from dico_ray.diffusion import Sampler
from dico_ray.diffusion.noise import Stream, normal
from dico_ray.measure import EvaluateActor, Judges, Made, Part, Total
from dico_ray.metrics import Inception
from dico_ray.models import DiCo
from dico_ray.sample import SampleActor
from dico_ray.settings import build, merge
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint, write_whole
from dico_ray.weights import CHECKPOINTS, find_checkpoint, load_network, model_of

_RELEASED_BATCH = 32
_VAE_WIDTHS = (128, 256, 512, 512)  # of Stable Diffusion's autoencoder
_FID_IMAGES = 50_000
_LEAST_SECONDS = 1.0


def main(
    config: Config, *, verbose: bool, images: int, timed_steps: int, evaluate: bool, weights: str, vae: str,
    actors: Sequence[int], folder: str, json: str,
) -> None:  # fmt: skip
    """Prints the table. Settings are those of `dico-ray sample`, and of `evaluate` for the feature network.

    images: how many each measurement generates on an actor. timed_steps: so many of the sampler's steps are timed for
    the network's phase and for the released way, and count for all (each costs the same); 0: all are. evaluate: also
    time generation with the judging. weights: "random" (a network of model.*), or "run" (the run's checkpoint and
    codec.vae). vae, beside random weights: "random" (of Stable Diffusion's sizes), or "codec" (codec.vae). actors:
    sizes of pools to compare. folder: for what is written; unset: a temporary one. json: a file. Raises ConfigError
    for impossible ones.
    """
    if weights not in ("random", "run") or vae not in ("random", "codec") or min(images, *actors, len(actors)) < 1:
        raise ConfigError(
            f"--weights {weights} --vae {vae} --images {images} --actors {list(actors)}: weights must be random or "
            "run, vae random or codec, and numbers 1 or more"
        )
    if not 0 <= timed_steps <= config.sample.steps:
        raise ConfigError(f"--timed_steps {timed_steps}: must be 0 to sample.steps, {config.sample.steps}")
    if timed_steps and config.sample.guidance_interval:
        raise ConfigError("--timed_steps: steps differ by sample.guidance_interval, so all have to be timed; take 0")
    with bench_folder(folder) as place:
        if weights == "run":
            run, checkpoint = config, find_checkpoint(config)
        else:
            path = config.codec.vae if vae == "codec" else random_autoencoder(config, Storage(f"{place}/vae"))
            run, checkpoint = _random_run(config, place, path)
        run = _with(run, sample={"output": f"{place}/images", "count": images * max(actors), "format": "png"})
        cluster.connect(verbose)
        figures = measure(run, checkpoint, images, actors, timed_steps, evaluate)
    _tell(figures)
    if json:
        there, name = os.path.split(os.path.abspath(json))
        Storage(there).write(name, dumps(figures, indent=1).encode())


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    return build(merge(config.model_dump(), sections))


def random_autoencoder(config: Config, folder: Storage) -> str:
    """Writes an autoencoder of Stable Diffusion's sizes with random weights; returns its place."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL
    levels = len(_VAE_WIDTHS)
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_VAE_WIDTHS, layers_per_block=2, latent_channels=config.model.in_channels,
        sample_size=8 * config.model.latent_size, scaling_factor=0.18215,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as here:  # save_pretrained knows no object stores
        vae.save_pretrained(here)
        for file in Path(here).iterdir():
            folder.write(file.name, file.read_bytes())
    return folder.url


def _random_run(config: Config, place: str, vae: str) -> tuple[Config, Checkpoint]:
    """A run of one checkpoint with random weights."""
    run = _with(config, run={"storage": place, "name": "random"}, codec={"vae": vae})
    network = DiCo(**weight_files.arguments(run.model))
    awaken(network)
    about = {
        "config": run.model_dump(mode="json"), "codec": {"vae": run.codec.vae, "hash": ""},
        "classes": [str(label) for label in range(run.model.num_classes)],
    }  # fmt: skip
    there = Storage(run.run.folder).at(CHECKPOINTS)
    return run, write_whole(there, 0, {"ema": dict(network.named_parameters())}, about)


def measure(
    config: Config, checkpoint: Checkpoint, images: int, actors: Sequence[int], timed_steps: int, evaluate: bool
) -> dict[str, Any]:
    """All figures, by pools of actors that stay; the first is measured alone before the others start."""
    gpu = cluster.uses_gpu(config.resources)
    largest = _with(config, resources={"actors": max(actors)})
    cluster.require_pool(largest.resources, gpu)
    kind = ray.remote(SamplingMeter).options(**cluster.actor_options(config.resources, gpu), max_concurrency=2)
    meters: list[Any] = [kind.remote(config, checkpoint, gpu)]
    found: dict[str, Any] = ray.get(meters[0].measure.remote(images, timed_steps, evaluate))
    meters += [kind.remote(config, checkpoint, gpu) for _ in range(max(actors) - 1)]
    ray.get([meter.warm.remote() for meter in meters])
    scaling = {str(size): _pool_rate(config, meters[:size], images) for size in sorted(set(actors))}
    ours, released = found["ours"]["images_per_s"], found["released"]["images_per_s"]
    judged = found.get("judged", found["ours"])["images_per_s"]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "parameters": parameter_count(model_of(checkpoint)), "latent_size": model_of(checkpoint).latent_size,
        "settings": {name: getattr(config, name).model_dump(mode="json") for name in ("sample", "codec", "evaluate")},
        "images": images, "timed_steps": timed_steps, **found, "ratio_released": ours / released,
        "fid_50k_device_hours": _FID_IMAGES / judged / 3600,
        "fid_50k_released_device_hours": _FID_IMAGES / released / 3600,
        "pool_images_per_s": scaling,
        "versions": {"torch": torch.__version__, "ray": ray.__version__, "python": platform.python_version()},
    }  # fmt: skip


def _pool_rate(config: Config, meters: list[Any], images: int) -> float:
    """Images/s of a pool of these actors, each with `images` to make on average."""
    size = config.sample.piece or config.sample.batch_size
    work = pool.ranges(images * len(meters), size)
    began = time.perf_counter()
    for _ in pool.run(pool.standing(meters), len(meters), work, ahead=1):
        pass
    return images * len(meters) / (time.perf_counter() - began)


class SamplingMeter(SampleActor):
    """A sampling actor that times itself. Rates are of images or, where named so, of the network's rows."""

    def __init__(self, config: Config, checkpoint: Checkpoint, gpu: bool) -> None:
        super().__init__(config, checkpoint, gpu)
        self._checkpoint = checkpoint

    def warm(self) -> None:
        """Compiles, and lets libraries choose their algorithms."""
        self.decode(self._answer(self._rows())[:, : self._about.in_channels])
        self._wait()

    def measure(self, images: int, timed_steps: int, evaluate: bool) -> dict[str, Any]:
        released = self._released(min(images, _RELEASED_BATCH), timed_steps)
        began = time.perf_counter()
        self.warm()
        warm_s = time.perf_counter() - began
        batch = min(images, self._config.sample.batch_size)
        network_s, latents = self._latents_timed(batch, timed_steps)
        decode_s, pixels = self._timed(lambda: self.decode(latents)[:batch])
        host_s, _ = self._timed(lambda: self._store(pixels))
        total_s, _ = self._timed(lambda: self.work((0, images)))
        forward = self._forward_rate(self._rows())
        seconds = {"network": network_s / len(latents), "decode": decode_s / len(latents), "host": host_s / batch}
        found = {"images_per_s": images / total_s, "start_s": warm_s, "seconds_per_image": seconds}
        found["share_of_network_rate"] = found["images_per_s"] * self.sampler.network_rows / forward
        judged = self._judged(images, pixels, forward) if evaluate else None
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "released": released, "ours": found, **({"judged": judged} if judged else {}),
            "network_rows_per_image": self.sampler.network_rows,
            "network_rows_per_s": forward,
        }  # fmt: skip

    def _latents_timed(self, count: int, timed_steps: int) -> tuple[float, torch.Tensor]:
        """Seconds of the sampler for a batch, and its latents; after a part of the steps, these are still noise."""
        if not timed_steps or not isinstance(self.sampler, Sampler):
            return self._timed(lambda: self.latents(0, count))
        rows = torch.arange(self._config.sample.batch_size, device=self.device)
        size = (self._about.in_channels, self._about.latent_size, self._about.latent_size)
        noise, seed = torch.randn(len(rows), *size, device=self.device), self._config.sample.seed
        return self._steps_timed(
            self.sampler, self.network, noise, self.labels(rows), timed_steps,
            lambda index: normal(seed, Stream.SAMPLE_STEP, index, rows, size),
        )  # fmt: skip

    @torch.inference_mode()
    def _steps_timed(
        self, sampler: Sampler, network: Any, x: torch.Tensor, y: torch.Tensor, steps: int,
        noise: Callable[[int], torch.Tensor] | None,
    ) -> tuple[float, torch.Tensor]:  # fmt: skip
        """Seconds that all of the sampler's steps take, by the first `steps` of them, and what these make of x."""

        def some() -> torch.Tensor:
            here = x
            for index in range(len(sampler) - 1, len(sampler) - 1 - steps, -1):
                here = sampler.step(network, here, index, noise, y=y)
            return here

        seconds, latents = self._timed(some)
        return seconds * len(sampler) / steps, latents

    def _judged(self, images: int, pixels: torch.Tensor, forward: float) -> dict[str, Any]:
        """Generation as `evaluate` runs it. pixels: a batch, of which features and statistics are timed alone."""
        made, parts = Made(self._config, self._checkpoint), self.images.folder.at("parts")
        network = Inception(untrained(), "untrained Inception-v3")
        judge = EvaluateActor(
            self._config, Judges(network), {"images": made}, {"images": parts}, self.device.type == "cuda", self
        )
        labels = torch.zeros(len(pixels), dtype=torch.int64)
        cut = self._config.evaluate.batch_size

        def features() -> Part:
            pairs = zip(pixels.split(cut), labels.split(cut), strict=True)
            return Part.join([judge.judge("images", *pair) for pair in pairs]).cpu()

        warm_s, part = self._timed(features)
        features_s, _ = self._timed(features)
        statistics_s, _ = self._timed(lambda: Total(1, 0).add(0, part))
        total = Total(1, 0)
        total_s, _ = self._timed(lambda: total.add(0, judge.work(("images", 0, images))))
        rate = images / total_s
        return {
            "images_per_s": rate, "start_s": warm_s,
            "seconds_per_image": {"features": features_s / len(pixels), "statistics": statistics_s / len(pixels)},
            "share_of_network_rate": rate * self.sampler.network_rows / forward,
        }  # fmt: skip

    def _rows(self) -> int:
        """Rows of one evaluation of the network."""
        doubled = self.sampler.network_rows > len(self.sampler.timesteps)
        return self._config.sample.batch_size * (2 if doubled else 1)

    @torch.inference_mode()
    def _answer(self, rows: int) -> torch.Tensor:
        """Of noise, as sampling's: zeros make a GPU draw less power, and products of them run faster."""
        side, device = self._about.latent_size, self.device
        x = torch.randn(rows, self._about.in_channels, side, side, device=device)
        t = torch.arange(rows, device=device) % self.sampler.timesteps.max()
        return self.network(x, t, y=t % self._about.num_classes)

    def _forward_rate(self, rows: int) -> float:
        """Rows/s of the network alone."""
        done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < _LEAST_SECONDS:
            self._answer(rows)
            self._wait()
            done += rows
        return done / seconds

    def _store(self, pixels: torch.Tensor) -> None:
        """A batch as `work` stores it, with nothing else going on."""
        found = pixels.cpu().numpy()
        with ThreadPoolExecutor(self._config.sample.writers) as threads:
            list(threads.map(lambda i: self.images.put(i, 0, found[i]), range(len(found))))

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        began = time.perf_counter()
        result = call()
        self._wait()
        return time.perf_counter() - began, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def _released(self, images: int, timed_steps: int) -> dict[str, Any]:
        """One batch the released way. Leaves the GPU's precision of products as it found it."""
        config = _with(self._config, sample={"precision": "fp32", "method": "ddpm"})
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        network = PlainDiCo(load_network(self._checkpoint, config).to(self.device))
        vae = Autoencoder(config.codec.vae, "fp32", self.device)
        vae.network.to(memory_format=torch.contiguous_format)
        side, channels = self._about.latent_size, self._about.in_channels
        x_T = torch.randn(images, channels, side, side, device=self.device)
        y = torch.randint(0, len(self._classes), (images,), device=self.device)
        sampler = self._make_sampler("ddpm")
        assert isinstance(sampler, Sampler)
        steps = timed_steps or len(sampler)
        self._steps_timed(sampler, network, x_T, y, 1, None)  # libraries choose their algorithms
        network_s, latents = self._steps_timed(sampler, network, x_T, y, steps, None)
        decode_s, pixels = self._timed(lambda: vae.decode(latents))
        host_s, _ = self._timed(lambda: self._store_one_by_one(pixels))
        torch.backends.cuda.matmul.allow_tf32 = allowed
        seconds = {"network": network_s, "decode": decode_s, "host": host_s}
        return {
            "images_per_s": images / sum(seconds.values()),
            "seconds_per_image": {phase: value / images for phase, value in seconds.items()},
        }

    def _store_one_by_one(self, pixels: torch.Tensor) -> None:
        for i, image in enumerate(pixels.cpu().numpy()):
            self.images.folder.write(f"released/{i:06d}.png", to_png(image))


def _tell(figures: dict[str, Any]) -> None:
    settings = figures["settings"]["sample"]
    print(
        f"\n{figures['parameters'] / 1e6:.1f}M parameters, latents {figures['latent_size']}^2, {settings['method']} in "
        f"{settings['steps']} steps, guidance {settings['guidance_scale']}"
    )
    print(f"on {figures['device']} ({figures['machine']})")
    print(f"{'':12}{'images/s':>10}   ms an image: network   decode     host")
    for name in ("released", "ours"):
        found = figures[name]
        phases = [1e3 * found["seconds_per_image"][phase] for phase in ("network", "decode", "host")]
        print(f"  {name:10}{found['images_per_s']:10.2f}{'':14}" + "".join(f"{value:9.1f}" for value in phases))
    if figures["timed_steps"]:
        print(
            f"  (network: {figures['timed_steps']} steps, counted for {settings['steps']}; released: all of its rate)"
        )
    print(
        f"ours is {figures['ratio_released']:.2f} times the released way's, and "
        f"{figures['ours']['share_of_network_rate']:.1%} of the network's own {figures['network_rows_per_s']:,.0f} "
        f"rows/s ({figures['network_rows_per_image']} rows an image)"
    )
    if "judged" in figures:
        judged = figures["judged"]
        phases = ", ".join(f"{phase} {1e3 * s:.2f} ms" for phase, s in judged["seconds_per_image"].items())
        print(
            f"  judged where made{judged['images_per_s']:10.2f} images/s, {judged['share_of_network_rate']:.1%} of the "
            f"network's rate ({phases} an image)"
        )
    print(
        f"{_FID_IMAGES:,} images take {figures['fid_50k_device_hours']:.2f} device-hours, the released way's files "
        f"{figures['fid_50k_released_device_hours']:.2f}"
    )
    for size, rate in figures["pool_images_per_s"].items():
        print(f"  pool of {size}: {rate:.2f} images/s")
