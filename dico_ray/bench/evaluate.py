"""`dico-ray bench evaluate`: images/s from stored files to the numbers, beside torch-fidelity's own feature pass.

Both read the same PNG files on this machine, in one run and with the same weights; an evaluation's rate does not
depend on what the weights are, so random ones do where the published are not at hand.

The network is also timed alone, on images that are on the device already and with features that stay there: eager in
batches of 50 and in PyTorch's own precision (TF32 convolutions on GPUs), as pytorch-fid and torch-fidelity run it, and
each way that evaluate.precision and evaluate.compile offer, with how far its features move from fp32's.

Pools of several sizes are timed on a Ray cluster, with actors that have compiled and warmed up.
"""

from __future__ import annotations

import copy
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from json import dumps
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from torch import Tensor, nn

from dico_ray import cluster, pool
from dico_ray.bench.folders import bench_folder
from dico_ray.bench.network import seconds_of
from dico_ray.config import Config, ConfigError
from dico_ray.data.generated import to_png
from dico_ray.data.image_sets import ImageSet
from dico_ray.measure import RANGES_AT_ONCE, EvaluateActor, Judges, Total, few_threads
from dico_ray.metrics import (
    Inception,
    Moments,
    Reference,
    frechet_distance,
    inception_score,
    open_network,
    precision_recall,
)
from dico_ray.reading import ImageReaders
from dico_ray.storage import Storage

_RIVAL_BATCH = 64  # torch-fidelity's default
_EAGER_BATCH = 50  # pytorch-fid's
_LEAST_SECONDS = 1.0
_RANGES_EACH = 4  # that an actor of the largest pool judges, at the least
WAYS = {  # evaluate.precision and evaluate.compile; all but the first are GPUs'
    "fp32": ("fp32", False), "tf32": ("tf32", False), "fp16": ("fp16", False), "tf32 compiled": ("tf32", True),
    "fp16 compiled": ("fp16", True),
}  # fmt: skip


def main(
    config: Config, *, verbose: bool, images: int, size: int, random: bool, rival: bool, ways: Sequence[str],
    actors: Sequence[int], folder: str, json: str,
) -> None:  # fmt: skip
    """Times an evaluation of random images and prints the table.

    images: how many. size: their height and width. random: an untrained Inception instead of evaluate.features.
    rival: also time torch-fidelity's pass over the same files. ways: of the network alone, some of WAYS, "all" or
    "none"; fp32 comes with any. actors: sizes of pools to compare, 0 for none. folder: for the images; unset: a
    temporary one. json: a file.
    Raises ConfigError for impossible ones, or if the rival is wanted with another network than Inception.
    """
    sizes = sorted(set(actors) - {0})
    if images < 8 or min(actors, default=-1) < 0:
        raise ConfigError(f"--images {images} --actors {list(actors)}: take 8 or more images, and 0 or more actors")
    gpu = torch.cuda.is_available() and config.resources.accelerator != "cpu"
    for name in ways:
        if name not in (*WAYS, "all", "none") or (name == "none" and len(ways) > 1):
            raise ConfigError(f"--ways {name}: take all, none, or some of {', '.join(WAYS)}")
        if name in list(WAYS)[1:] and not gpu:
            raise ConfigError(f"--ways {name}: it is a GPU's way, and this runs on CPUs; take all, none or fp32")
    if (ranges := -(-images // config.evaluate.range_size)) < _RANGES_EACH * max(sizes, default=0):
        raise ConfigError(
            f"--images {images}: {ranges} ranges (evaluate.range_size {config.evaluate.range_size}) keep no pool of "
            f"{max(sizes)} busy; take {_RANGES_EACH} ranges an actor or more"
        )
    network = Inception(untrained(), "untrained Inception-v3") if random else open_network(config.evaluate.features)
    if rival and not isinstance(network, Inception):
        raise ConfigError("--rival true: torch-fidelity's pass is Inception's; take --rival false")
    if rival and folder and not Storage(folder).is_local:
        raise ConfigError(f"--folder {folder}: torch-fidelity reads local files; take --rival false")
    _connect(config, max(sizes, default=0), verbose)
    with bench_folder(folder) as place:
        source = _write(Storage(place).at(f"{images}-images-of-{size}"), images, size)
        parts = Storage(place).at("parts")
        figures: dict[str, Any] = {"ways": _ways(config, network, source, gpu, ways)}
        if rival and isinstance(network, Inception):
            figures["eager_images_per_s"] = _eager_rate(network.network, source, gpu)
        figures |= _ours(config, network, source, parts, gpu)
        if rival and isinstance(network, Inception):
            figures["torch_fidelity_images_per_s"] = images / _rival(network.network, source, gpu)
        figures["pool_images_per_s"] = _pools(config, network, source, parts, sizes) if sizes else {}
    figures |= {"images": images, "size": size, "device": torch.cuda.get_device_name() if gpu else "cpu",
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
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


def _write(folder: Storage, count: int, size: int) -> ImageSet:
    """PNG files that compress as images do: noise over a coarse pattern."""

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))
        noise = rng.integers(0, 8, (size, size, 3), dtype=np.uint8)
        folder.write(f"{i:06d}.png", to_png(np.asarray(coarse) // 8 * 8 + noise))

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(count)))
    return ImageSet.scan(folder.url, "evaluate.images")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the call returns; what it left running on the GPU counts."""
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _ways(config: Config, network: Any, source: ImageSet, gpu: bool, names: Sequence[str]) -> dict[str, Any]:
    """The network alone, in fp32 and each way that is named.

    Images/s, seconds of the first batch, and what its features are beside fp32's.

    difference_rms: in standard deviations of a feature. distance: Frechet distance between the two sets' features.
    """
    device = torch.device("cuda" if gpu else "cpu")
    count = min(config.evaluate.batch_size, source.count)
    pixels = torch.from_numpy(source.read(0, count)).to(device)
    labels = torch.zeros(count, dtype=torch.int64)
    rows: dict[str, Any] = {}
    exact = torch.zeros(0)
    for name, (precision, compiled) in WAYS.items():
        if "none" in names or (rows and not (gpu and ("all" in names or name in names))):
            continue
        way = config.evaluate.model_copy(update={"precision": precision, "compile": compiled})
        own = Judges(copy.deepcopy(network))
        actor = EvaluateActor(config.model_copy(update={"evaluate": way}), own, {}, {}, gpu)
        first, part = _timed(lambda actor=actor: actor.judge("images", pixels, labels))
        features = part.features.pool.double().cpu()
        exact = exact if rows else features
        seconds = seconds_of(lambda actor=actor: actor.judge("images", pixels, labels), device, _LEAST_SECONDS)
        rows[name] = {
            "images_per_s": count / seconds,
            "start_s": first,
            "difference_rms": float((features - exact).square().mean().sqrt() / exact.std(dim=0).mean()),
            "distance": _distance(features, exact),
        }
    return rows


def _distance(one: Tensor, two: Tensor) -> float:
    found = [Moments(features.shape[1]) for features in (one, two)]
    for moments, features in zip(found, (one, two), strict=True):
        moments.add(features)
    return frechet_distance(*found[0].compute(), *found[1].compute())


def _eager_rate(network: Any, source: ImageSet, gpu: bool) -> float:
    """Images/s of torch-fidelity's network alone, called as pytorch-fid and torch-fidelity call theirs."""
    device = torch.device("cuda" if gpu else "cpu")
    network.to(device, memory_format=torch.contiguous_format)
    count = min(_EAGER_BATCH, source.count)
    pixels = torch.from_numpy(source.read(0, count)).permute(0, 3, 1, 2).contiguous().to(device)
    with torch.no_grad():
        return count / seconds_of(lambda: network(pixels), device, _LEAST_SECONDS)


def _ours(config: Config, network: Any, source: ImageSet, parts: Storage, gpu: bool) -> dict[str, float]:
    """Rates of the whole way and of its phases, and seconds for the scores."""
    actor = EvaluateActor(config, Judges(copy.deepcopy(network)), {"images": source}, {"images": parts}, gpu)
    work = pool.ranges(source.count, config.evaluate.range_size)
    actor.work(("images", *work[0]))  # compiles, picks kernels
    total = Total(1, 0)

    def whole() -> None:
        """Several ranges at a time, as an actor of the pool has them."""
        with ThreadPoolExecutor(RANGES_AT_ONCE) as threads, few_threads():
            for (start, _), part in zip(work, threads.map(lambda one: actor.work(("images", *one)), work), strict=True):
                total.add(start, part)

    seconds, _ = _timed(whole)
    batch = source.read(0, min(config.evaluate.batch_size, source.count))
    labels = torch.zeros(len(batch), dtype=torch.int64)
    part = actor.judge("images", batch, labels).cpu()
    readers = actor.readers
    assert readers
    reading, _ = _timed(lambda: _read(readers, source, work, len(batch)))
    forward = seconds_of(lambda: actor.judge("images", batch, labels).cpu(), actor.device, _LEAST_SECONDS)
    with few_threads():
        statistics = seconds_of(lambda: Total(1, 0).add(0, part), torch.device("cpu"), _LEAST_SECONDS)
    scores, _ = _timed(lambda: _scores(total, "cuda" if gpu else "cpu"))
    return {
        "images_per_s": source.count / seconds,
        "read_images_per_s": source.count / reading,
        "network_images_per_s": len(batch) / forward,
        "statistics_images_per_s": len(batch) / statistics,
        "scores_s": scores,
    }


def _connect(config: Config, actors: int, verbose: bool) -> None:
    """Before anything is timed. Raises ConfigError if there is no room for so many."""
    cluster.connect(verbose)
    if not actors:
        return
    gpu = cluster.uses_gpu(config.resources)
    cluster.require_pool(config.resources.model_copy(update={"actors": actors}), gpu)
    options = cluster.actor_options(config.resources, gpu)
    bundle = {"CPU": options["num_cpus"], **({"GPU": options["num_gpus"]} if gpu else {})}
    if not cluster.has_room(actors, bundle, {}):
        raise ConfigError(f"--actors: the cluster has no room for {actors} of {bundle} now; wait for it, or take fewer")


def _pools(config: Config, network: Any, source: ImageSet, parts: Storage, sizes: list[int]) -> dict[str, float]:
    """Images/s of pools of actors that stay, each of which has judged one range before."""
    gpu = cluster.uses_gpu(config.resources)
    kind: Any = ray.remote(EvaluateActor).options(
        **cluster.actor_options(config.resources, gpu), max_concurrency=RANGES_AT_ONCE
    )
    judges, sources = ray.put(Judges(copy.deepcopy(network).cpu())), ray.put({"images": source})
    actors = [kind.remote(config, judges, sources, {"images": parts}, gpu) for _ in range(max(sizes))]
    work = [("images", *piece) for piece in pool.ranges(source.count, config.evaluate.range_size)]
    ray.get([actor.work.remote(work[0]) for actor in actors])
    rates = {}
    for size in sizes:
        total = Total(1, 0)
        began = time.perf_counter()
        with few_threads():
            for (_, start, _), part in pool.run(pool.standing(actors[:size]), size, work, ahead=RANGES_AT_ONCE - 1):
                total.add(start, part)
        rates[str(size)] = source.count / (time.perf_counter() - began)
    return rates


def _read(readers: ImageReaders, source: ImageSet, work: list[pool.Range], batch: int) -> None:
    """All images, several ranges at a time, as an actor does."""

    def one(piece: pool.Range) -> None:
        low, high = piece
        for _ in readers.batches(source, [(low + a, low + b) for a, b in pool.ranges(high - low, batch)]):
            pass

    with ThreadPoolExecutor(RANGES_AT_ONCE) as threads:
        list(threads.map(one, work))


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
    print(f"  network, host to host {figures['network_images_per_s']:10.1f} images/s")
    print(f"  statistics            {figures['statistics_images_per_s']:10.1f} images/s")
    print(f"  scores, at the end    {figures['scores_s']:10.1f} s")
    for size, rate in figures["pool_images_per_s"].items():
        print(f"  pool of {size:<14}{rate:10.1f} images/s")
    rival, eager = figures.get("torch_fidelity_images_per_s"), figures.get("eager_images_per_s")
    if rival:
        print(f"  torch-fidelity's pass {rival:10.1f} images/s: ours is {figures['images_per_s'] / rival:.2f} of it")
    if not (figures["ways"] or eager):
        return
    print(f"the network alone, on the device, batches of {figures['batch_size']}; its features beside fp32's")
    print(f"  {'':20}images/s{'' if eager is None else '   of eager'}   first batch   move (rms)   distance")
    if eager:
        print(f"  {'eager, batch 50':16}{eager:12.1f}{1:11.2f}")
    for name, row in figures["ways"].items():
        share = f"{row['images_per_s'] / eager:11.2f}" if eager else ""
        print(
            f"  {name:16}{row['images_per_s']:12.1f}{share}{row['start_s']:12.1f} s{row['difference_rms']:13.1e}"
            f"{row['distance']:11.1e}"
        )
