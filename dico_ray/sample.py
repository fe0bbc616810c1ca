"""The door `sample`: a checkpoint -> images by class, on a pool of actors.

Image i is a function of (sample.seed, i) and the settings, whatever the pool, batch size or order. Each actor takes
ranges of images from a queue; the same command, started again, makes only the images that are missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from dico_ray import __version__, cluster, pool
from dico_ray.config import Config, ConfigError
from dico_ray.config.sampling import Sample
from dico_ray.data.generated import IMAGES, ImageSet, Range, gaps, image_set, to_png
from dico_ray.data.latents import Autoencoder
from dico_ray.diffusion import Diffusion, Guidance, Sampler, Solver, make_sampler
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.models import compile_blocks, graph_inference, use_kernels
from dico_ray.progress import Progress
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.ema import initial_share
from dico_ray.weights import check_codec, find_checkpoint, load_network, model_of

__all__ = ["GRID", "IMAGES", "RECORD", "SampleActor", "draw_labels", "grid_picture", "main", "output_folder"]

GRID, RECORD = "grid.png", "samples.json"
_UNFINISHED = "unfinished.json"  # the record of images that are being made
_GRID_COLUMNS = 10
# Settings of how the work is cut and where it goes, not of what the images are.
_NOT_RECORDED = {"checkpoint", "batch_size", "decode_batch", "piece", "writers", "output", "classes", "cuda_graphs"}


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray sample`: writes the images, grid.png and samples.json into sample.output.

    Raises ConfigError where no checkpoint is, its autoencoder is not the one at codec.vae, or it has no such labels.
    """
    checkpoint = find_checkpoint(config)
    check(config, checkpoint)
    output = output_folder(config)
    record = provenance(config, checkpoint)
    if _recorded(output, RECORD) == record:
        print(f"sample: {output.url} has these images: nothing to do")
        return
    if not checkpoint.about["codec"]["hash"]:
        print(f"sample: the checkpoint does not tell its autoencoder: {config.codec.vae} decodes, unchecked")
    if told := young_average(config, checkpoint):
        print(f"sample: {told}")
    count, classes = config.sample.count, checkpoint.about["classes"]
    images = image_set(config.sample.format, output, classes, count)
    if _recorded(output, _UNFINISHED) != record:
        _check_ours(output, images)
        output.remove(RECORD)
        images.clear()
        output.write(_UNFINISHED, json.dumps(record, indent=1).encode())
    missing = gaps(count, images.held())
    if missing:
        cluster.connect(verbose, config.run.name)
        _make(config, checkpoint, missing)
    where = images.finish(draw_labels(config.sample, len(classes), torch.arange(count)).numpy())
    shown = images.read(grid_indices(config, len(classes)))
    output.write(GRID, grid_picture(config, len(classes), shown))
    output.write(RECORD, json.dumps(record, indent=1).encode())
    output.remove(_UNFINISHED)
    print(f"sample: {count} images in {where}, grid {output.url}/{GRID}")


def _check_ours(output: Storage, images: ImageSet) -> None:
    """Raises ConfigError if an earlier set's place holds files that no record of ours vouches for."""
    ours = output.exists(RECORD) or output.exists(_UNFINISHED)
    found = next((name for name in images.places if not ours and output.exists(name)), None)
    if found:
        raise ConfigError(
            f"sample.output: {output.url} holds {found}, which no {RECORD} vouches for and which images would replace; "
            "name another folder"
        )


def _recorded(output: Storage, name: str) -> Any:
    return json.loads(output.read(name)) if output.exists(name) else None


def check(config: Config, checkpoint: Checkpoint) -> None:
    """Raises ConfigError for settings that do not fit the checkpoint's network."""
    sample, classes = config.sample, len(checkpoint.about["classes"])
    wrong = next((label for label in sample.classes if label >= classes), None)
    if wrong is not None:
        raise ConfigError(f"sample.classes: {wrong} is no label of the checkpoint; its labels are 0 to {classes - 1}")
    channels = model_of(checkpoint).in_channels
    if sample.guidance_scale != 1 and sample.guidance_channels == "3" and channels < 3:
        raise ConfigError(
            f"sample.guidance_channels: 3, but the latents have {channels} channels; set sample.guidance_channels: all"
        )


def young_average(config: Config, checkpoint: Checkpoint) -> str:
    """What to know of averages that still hold much of the initial weights; empty otherwise."""
    if config.sample.weights != "ema" or "ema_decay" not in checkpoint.about.get("config", {}).get("train", {}):
        return ""
    decay = checkpoint.about["config"]["train"]["ema_decay"]
    share = initial_share(decay, checkpoint.step)
    if not share or "imported" in checkpoint.about or "posthoc" in checkpoint.about:
        return ""
    return (
        f"{100 * share:.0f}% of the averaged weights at step {checkpoint.step} are still the initial ones "
        f"(train.ema_decay {decay:g}): train longer, or take --sample.weights model"
    )


def _make(config: Config, checkpoint: Checkpoint, missing: list[Range]) -> None:
    """Has a pool of actors make and store these ranges of images."""
    gpu = cluster.uses_gpu(config.resources)
    cluster.require_pool(config.resources, gpu)
    actor = ray.remote(SampleActor).options(**cluster.actor_options(config.resources, gpu), max_concurrency=2)
    size = config.sample.piece or config.sample.batch_size
    work = [(first + a, first + b) for first, end in missing for a, b in pool.ranges(end - first, size)]
    done = already = config.sample.count - sum(stop - start for start, stop in missing)
    with Progress("sample", config.sample.count, "images", already) as progress:
        if already:
            progress.note(f"{already} images are there: goes on with the others")
        start_actor, size = lambda: actor.remote(config, checkpoint, gpu), config.resources.actors
        for (start, stop), _ in pool.run(start_actor, size, work, ahead=1):
            done += stop - start
            progress.update(done)


def output_folder(config: Config) -> Storage:
    return Storage(config.sample.output) if config.sample.output else Storage(config.run.folder).at("samples")


def provenance(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Every choice that moves an image, and the format."""
    known, names = checkpoint.about["codec"]["hash"], checkpoint.about["classes"]
    chosen = config.sample.classes
    return {
        **({} if known else {"decoder": config.codec.vae, "decoder_checked": False}),
        "checkpoint": checkpoint.hash, "step": checkpoint.step, "codec": checkpoint.about["codec"],
        "codec_precision": config.codec.precision, "codec_compile": config.codec.compile, "classes": names,
        "drawn_labels": list(chosen) or None,
        "grid_classes": [names[label] for label in chosen or range(len(names))][:_GRID_COLUMNS],
        **config.sample.model_dump(mode="json", exclude=_NOT_RECORDED),
        "versions": {"dico_ray": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
    }  # fmt: skip


def draw_labels(sample: Sample, classes: int, rows: Tensor) -> Tensor:
    """Labels of images by number: int64 `(N,)` both. classes: how many the checkpoint has."""
    chosen = torch.tensor(sample.classes or range(classes), device=rows.device)
    if sample.labels == "balanced":
        return chosen[rows % len(chosen)]
    return chosen[integers(sample.seed, Stream.SAMPLE_LABEL, 0, rows, len(chosen))]


def grid_indices(config: Config, classes: int) -> list[int]:
    """The images of the grid, row by row: a column per class (the first ten), where labels are balanced."""
    drawn = len(config.sample.classes) or classes
    columns = min(_GRID_COLUMNS, drawn)
    stride = drawn if config.sample.labels == "balanced" else columns
    cells = [row * stride + column for row in range(config.sample.grid_rows) for column in range(columns)]
    return [i for i in cells if i < config.sample.count]


def grid_picture(config: Config, classes: int, cells: dict[int, np.ndarray]) -> bytes:
    """Images by index -> one PNG."""
    indices = grid_indices(config, classes)
    size = cells[indices[0]].shape[0]
    columns = min(_GRID_COLUMNS, len(config.sample.classes) or classes)
    rows = -(-len(indices) // columns)
    canvas = np.zeros((rows * (size + 2) - 2, columns * (size + 2) - 2, 3), np.uint8)
    for place, index in enumerate(indices):
        top, left = (place // columns) * (size + 2), (place % columns) * (size + 2)
        canvas[top : top + size, left : left + size] = cells[index]
    return to_png(canvas)


class SampleActor:
    """Holds the network and the autoencoder; generates, decodes and stores ranges of images."""

    def __init__(self, config: Config, checkpoint: Checkpoint, gpu: bool) -> None:
        cluster.quiet()
        self._config = config
        self.device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
        self.vae = Autoencoder(config.codec.vae, config.codec.precision, self.device, gpu and config.codec.compile)
        check_codec(checkpoint, self.vae)
        self._about = model_of(checkpoint)
        self.network = load_network(checkpoint, config).to(self.device)
        print(f"kernels: {use_kernels(self.network, config.model.kernels, self.device)}")
        compiled, graphed = gpu and config.sample.compile, gpu and config.sample.cuda_graphs
        if compiled:
            compile_blocks(self.network)
        if graphed:
            graph_inference(self.network)
        self._one_shape = compiled or graphed
        self._classes: list[str] = checkpoint.about["classes"]
        self.images: ImageSet = image_set(
            config.sample.format, output_folder(config), self._classes, config.sample.count
        )
        self.sampler = self._make_sampler(config.sample.method)
        self._device_is_free = threading.Lock()

    def _make_sampler(self, method: str) -> Sampler | Solver:
        sample, guidance = self._config.sample, None
        if sample.guidance_scale != 1:
            channels = 3 if sample.guidance_channels == "3" else None
            guidance = Guidance(
                sample.guidance_scale, self._about.num_classes, channels=channels, interval=sample.guidance_interval
            )
        return make_sampler(Diffusion(), sample.steps, method, guidance)

    def work(self, piece: Range) -> int:
        """Makes and stores images [start, stop); threads compress and store a batch while the next is generated.

        Two threads may be in it: while one's last images are stored, the other generates.
        """
        labels = self.labels(torch.arange(*piece)).tolist()
        with ThreadPoolExecutor(self._config.sample.writers) as threads:
            parts = []
            with self._device_is_free:
                for start, images in self._batches(*piece):
                    copy = _HostCopy(images)
                    parts += [
                        threads.submit(self._put, start, i, labels[start + i - piece[0]], copy)
                        for i in range(len(images))
                    ]
            self.images.close(piece, labels, [part.result() for part in parts])
        return piece[1] - piece[0]

    def _put(self, start: int, place: int, label: int, copy: _HostCopy) -> Any:
        return self.images.put(start + place, label, copy.numpy()[place])

    def generate(self, start: int, stop: int) -> tuple[np.ndarray, Tensor]:
        """Images [start, stop): uint8 (N, H, W, 3) on the host, and their labels int64 (N,)."""
        images, labels = self.generate_on_device(start, stop)
        return images.cpu().numpy(), labels

    def generate_on_device(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same with the images, uint8 (N, H, W, 3), where the network is."""
        images = torch.cat([images for _, images in self._batches(start, stop)])
        return images, self.labels(torch.arange(start, stop))

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(number of its first image, images) for each batch of [start, stop)."""
        for a, b in pool.ranges(stop - start, self._config.sample.batch_size):
            yield start + a, self.decode(self.latents(start + a, start + b))[: b - a]

    @torch.inference_mode()
    def latents(self, start: int, stop: int) -> Tensor:
        """Scaled latents (N, C, h, w) of images [start, stop).

        Compiled and captured networks are given whole batches: the latents of images that follow come along at the end.
        """
        seed = self._config.sample.seed
        if self._one_shape:
            stop = start + self._config.sample.batch_size
        rows = torch.arange(start, stop, device=self.device)
        size = (self._about.in_channels, self._about.latent_size, self._about.latent_size)
        return self.sampler.sample(
            self.network,
            normal(seed, Stream.SAMPLE_START, 0, rows, size),
            noise=lambda index: normal(seed, Stream.SAMPLE_STEP, index, rows, size),
            y=self.labels(rows),
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 (N, H, W, 3) on the device, sample.decode_batch at a time."""
        return torch.cat([self.vae.decode(part) for part in latents.split(self._config.sample.decode_batch)])

    def labels(self, rows: Tensor) -> Tensor:
        return draw_labels(self._config.sample, len(self._classes), rows)


class _HostCopy:
    """Images on their way to the host: only who looks at them waits for the device."""

    def __init__(self, images: Tensor) -> None:
        self._images, self._arrived = images, None
        if images.is_cuda:
            self._images = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
            self._images.copy_(images, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numpy(self) -> np.ndarray:
        if self._arrived:
            self._arrived.synchronize()
        return self._images.numpy()
