"""`dico-ray bench evaluate`: images/s from stored files to the numbers, beside torch-fidelity's own feature pass.

Both read the same PNG files on this machine, in one run and with the same weights; an evaluation's rate does not
depend on what the weights are, so random ones do where the published are not at hand.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dico_ray import pool
from dico_ray.config import Config, ConfigError
from dico_ray.data.image_sets import ImageSet
from dico_ray.measure import EvaluateActor, Judges, Total
from dico_ray.metrics import Inception, Reference, frechet_distance, inception_score, open_network, precision_recall
from dico_ray.storage import Storage

_RIVAL_BATCH = 64  # torch-fidelity's default


def main(config: Config, *, verbose: bool, images: int, size: int, random: bool, rival: bool, json: str) -> None:
    """Times an evaluation of random images and prints the table.

    images: how many. size: their height and width. random: an untrained Inception instead of evaluate.features.
    rival: also time torch-fidelity's pass over the same files. json: a file for the figures.
    Raises ConfigError for fewer than 8 images, or if the rival is wanted with another network than Inception.
    """
    if images < 8:
        raise ConfigError(f"--images {images}: take 8 or more")
    network = Inception(untrained(), "untrained Inception-v3") if random else open_network(config.evaluate.features)
    if rival and not isinstance(network, Inception):
        raise ConfigError("--rival true: torch-fidelity's pass is Inception's; take --rival false")
    gpu = torch.cuda.is_available() and config.resources.accelerator != "cpu"
    with tempfile.TemporaryDirectory(prefix="dico-ray-bench-") as folder:
        source = _write(Path(folder) / "images", images, size)
        figures = _ours(config, network, source, Storage(folder).at("parts"), gpu)
        if rival and isinstance(network, Inception):
            figures["torch_fidelity_images_per_s"] = images / _rival(network.network, source, gpu)
    figures |= {"images": images, "size": size, "device": torch.cuda.get_device_name() if gpu else "cpu",
                "batch_size": config.evaluate.batch_size, "precision": config.evaluate.precision,
                "compile": config.evaluate.compile, "torch": torch.__version__}  # fmt: skip
    _tell(figures)
    if json:
        folder, name = os.path.split(os.path.abspath(json))
        Storage(folder).write(name, dumps(figures, indent=1).encode())


def untrained(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the names of torch-fidelity's Inception, of a size that keeps its activations alive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
            """The constructor asks for a file; what it holds is not looked at."""

    with tempfile.NamedTemporaryFile() as file:
        torch.save({}, file.name)
        names: Any = ["2048"]
        network = Untrained("inception-v3-compat", names, feature_extractor_weights_path=file.name)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.1
        if isinstance(module, nn.Linear):
            module.weight.data *= 10  # pooled features hardly differ, and the logits should
            module.bias.data = torch.randn(module.out_features, generator=generator)
    return network.state_dict()


def _write(folder: Path, count: int, size: int) -> ImageSet:
    """PNG files that compress as images do: noise over a coarse pattern."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        noise = rng.integers(0, 8, (size, size, 3), dtype=np.uint8)
        Image.fromarray(np.asarray(coarse) // 8 * 8 + noise).save(folder / f"{i:06d}.png")
    return ImageSet.scan(str(folder), "evaluate.images")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the call returns; what it left running on the GPU counts."""
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _ours(config: Config, network: Any, source: ImageSet, parts: Storage, gpu: bool) -> dict[str, float]:
    """Rates of the whole way and of its phases, and seconds for the scores."""
    actor = EvaluateActor(config, Judges(network), {"images": source}, {"images": parts}, gpu)
    work = pool.ranges(source.count, config.evaluate.range_size)
    actor.work(("images", *work[0]))  # compiles, picks kernels
    total = Total(1, 0)

    def whole() -> None:
        for start, stop in work:
            total.add(start, actor.work(("images", start, stop)))

    seconds, _ = _timed(whole)
    batch = source.read(0, min(config.evaluate.batch_size, source.count))
    repeats = -(-source.count // len(batch))
    labels = torch.zeros(len(batch), dtype=torch.int64)
    reading, _ = _timed(lambda: [source.read(*one) for one in pool.ranges(source.count, len(batch))])
    forward, _ = _timed(lambda: [actor.judge("images", batch, labels) for _ in range(repeats)])
    statistics, _ = _timed(lambda: Total(1, 0).add(0, actor.judge("images", batch, labels)))
    scores, _ = _timed(lambda: _scores(total, "cuda" if gpu else "cpu"))
    return {
        "images_per_s": source.count / seconds,
        "read_images_per_s": source.count / reading,
        "network_images_per_s": repeats * len(batch) / forward,
        "statistics_s_per_batch": max(0.0, statistics - forward / repeats),
        "scores_s": scores,
    }


def _scores(total: Total, device: str) -> None:
    """The images against themselves."""
    own = Reference.of(total.statistics)
    assert own.pool is not None
    frechet_distance(*own.pool, *own.pool)
    if own.spatial is not None:
        frechet_distance(*own.spatial, *own.spatial)
    logits = total.statistics.logits()
    if logits is not None:
        inception_score(logits)
    precision_recall(total.statistics.features(), total.statistics.features(), 3, device)


def _rival(network: Any, source: ImageSet, gpu: bool) -> float:
    """Seconds of torch-fidelity's own pass: its dataset, loader and loop, eager, over the same files and weights."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.utils import get_featuresdict_from_dataset

    network.to("cuda" if gpu else "cpu", memory_format=torch.contiguous_format)
    files = [source.storage.path(piece.file) for piece in source.source.pieces]  # pyright: ignore[reportAttributeAccessIssue]
    dataset = ImagesPathDataset(files)
    for part in (ImagesPathDataset(files[:8]), dataset):  # the first warms it up
        seconds, _ = _timed(
            lambda part=part: get_featuresdict_from_dataset(part, network, _RIVAL_BATCH, gpu, False, False)
        )
    return seconds


def _tell(figures: dict[str, Any]) -> None:
    print(f"bench evaluate: {figures['images']} images of {figures['size']} pixels on {figures['device']}")
    print(f"  files to statistics   {figures['images_per_s']:10.1f} images/s")
    print(f"  reading alone         {figures['read_images_per_s']:10.1f} images/s")
    print(f"  network alone         {figures['network_images_per_s']:10.1f} images/s")
    print(f"  statistics            {figures['statistics_s_per_batch']:10.3f} s a batch")
    print(f"  scores, at the end    {figures['scores_s']:10.1f} s")
    rival = figures.get("torch_fidelity_images_per_s")
    if rival:
        print(f"  torch-fidelity's pass {rival:10.1f} images/s: ours is {figures['images_per_s'] / rival:.2f} of it")
