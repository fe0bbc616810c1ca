"""The door `sample`: a checkpoint -> images by class, on a pool of actors.

Image i is a function of (sample.seed, i) and the settings, whatever the pool, batch size or order.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from dico_ray import __version__, cluster, pool
from dico_ray.config import Config
from dico_ray.data.latents import Autoencoder
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.diffusion.process import Diffusion
from dico_ray.diffusion.sampler import Guidance, Sampler
from dico_ray.progress import Progress
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.weights import check_codec, find_checkpoint, load_network, model_of

IMAGES, GRID, RECORD = "images", "grid.png", "samples.json"
_GRID_COLUMNS = 10


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray sample`: writes images/CLASS/INDEX.png, grid.png and samples.json into sample.output.

    Raises ConfigError where no checkpoint is, or its autoencoder is not the one at codec.vae.
    """
    checkpoint = find_checkpoint(config)
    output = output_folder(config)
    record = provenance(config, checkpoint)
    if output.exists(RECORD) and json.loads(output.read(RECORD)) == record:
        print(f"sample: {output.url} has these images: nothing to do")
        return
    if not checkpoint.about["codec"]["hash"]:
        print(f"sample: the checkpoint does not tell its autoencoder: {config.codec.vae} decodes, unchecked")
    cluster.connect(verbose, config.run.name)
    gpu = cluster.uses_gpu(config.resources)
    actors = config.resources.actors
    cluster.require(
        actors * config.resources.actor_cpus, actors if gpu else 0, f"a pool of {actors} actors", "resources.actors"
    )
    output.remove(IMAGES)
    output.remove(RECORD)
    actor = ray.remote(SampleActor).options(num_cpus=config.resources.actor_cpus, num_gpus=1 if gpu else 0)
    work = pool.ranges(config.sample.count, config.sample.batch_size)
    cells: dict[int, np.ndarray] = {}
    done = 0
    with Progress("sample", config.sample.count, "images") as progress:
        for (start, stop), found in pool.run(lambda: actor.remote(config, checkpoint, gpu), actors, work):
            cells |= found
            done += stop - start
            progress.update(done)
    output.write(GRID, grid_picture(config, len(checkpoint.about["classes"]), cells))
    output.write(RECORD, json.dumps(record, indent=1).encode())
    print(f"sample: {done} images in {output.url}/{IMAGES}, grid {output.url}/{GRID}")


def output_folder(config: Config) -> Storage:
    return Storage(config.sample.output) if config.sample.output else Storage(config.run.folder).at("samples")


def provenance(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Every choice that moves an image."""
    known = checkpoint.about["codec"]["hash"]
    return {
        **({} if known else {"decoder": config.codec.vae, "decoder_checked": False}),
        "checkpoint": checkpoint.hash, "step": checkpoint.step, "codec": checkpoint.about["codec"],
        "codec_precision": config.codec.precision, "classes": checkpoint.about["classes"],
        **config.sample.model_dump(mode="json", exclude={"checkpoint", "batch_size", "output"}),
        "versions": {"dico_ray": __version__, "torch": torch.__version__},
    }  # fmt: skip


def grid_indices(config: Config, classes: int) -> list[int]:
    """The images of the grid, row by row: a column per class (the first ten), where labels are balanced."""
    columns = min(_GRID_COLUMNS, classes)
    stride = classes if config.sample.labels == "balanced" else columns
    cells = [row * stride + column for row in range(config.sample.grid_rows) for column in range(columns)]
    return [i for i in cells if i < config.sample.count]


def grid_picture(config: Config, classes: int, cells: dict[int, np.ndarray]) -> bytes:
    """Images by index -> one PNG."""
    indices = grid_indices(config, classes)
    size = cells[indices[0]].shape[0]
    columns = min(_GRID_COLUMNS, classes)
    rows = -(-len(indices) // columns)
    canvas = np.zeros((rows * (size + 2) - 2, columns * (size + 2) - 2, 3), np.uint8)
    for place, index in enumerate(indices):
        top, left = (place // columns) * (size + 2), (place % columns) * (size + 2)
        canvas[top : top + size, left : left + size] = cells[index]
    return to_png(canvas)


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class SampleActor:
    """Holds the network and the autoencoder; generates, decodes and stores ranges of images."""

    def __init__(self, config: Config, checkpoint: Checkpoint, gpu: bool) -> None:
        cluster.quiet()
        self._config = config
        self._device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
        self._vae = Autoencoder(config.codec.vae, config.codec.precision, self._device)
        if config.codec.precision == "fp32":
            check_codec(checkpoint, self._vae)
        self._about = model_of(checkpoint)
        self._model = load_network(checkpoint, config).to(self._device)
        self._classes: list[str] = checkpoint.about["classes"]
        self._grid = set(grid_indices(config, len(self._classes)))
        self._output = output_folder(config)
        self._sampler = self._make_sampler()

    def _make_sampler(self) -> Sampler:
        sample = self._config.sample
        guidance = Guidance(
            sample.guidance_scale,
            self._about.num_classes,
            channels=3 if sample.guidance_channels == "3" else None,
            interval=sample.guidance_interval,
        )
        return Sampler(Diffusion(), sample.steps, sample.method, guidance)

    def work(self, piece: tuple[int, int]) -> dict[int, np.ndarray]:
        """Stores images [start, stop); returns those that the grid shows."""
        images, labels = self.generate(*piece)
        shown = {}
        for index, pixels, label in zip(range(*piece), images, labels.tolist(), strict=True):
            self._output.write(f"{IMAGES}/{self._classes[label]}/{index:06d}.png", to_png(pixels))
            if index in self._grid:
                shown[index] = pixels
        return shown

    @torch.inference_mode()
    def generate(self, start: int, stop: int) -> tuple[np.ndarray, torch.Tensor]:
        """Images [start, stop): uint8 (N, H, W, 3), and their labels (N,)."""
        seed = self._config.sample.seed
        rows = torch.arange(start, stop, device=self._device)
        labels = self.labels(rows)
        size = (self._about.in_channels, self._about.latent_size, self._about.latent_size)
        latents = self._sampler.sample(
            self._model,
            normal(seed, Stream.SAMPLE_START, 0, rows, size),
            noise=lambda index: normal(seed, Stream.SAMPLE_STEP, index, rows, size),
            y=labels,
        )
        return self._vae.decode(latents).cpu().numpy(), labels

    def labels(self, rows: torch.Tensor) -> torch.Tensor:
        if self._config.sample.labels == "balanced":
            return rows % len(self._classes)
        return integers(self._config.sample.seed, Stream.SAMPLE_LABEL, 0, rows, len(self._classes))
