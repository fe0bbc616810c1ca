"""Images, from files or straight from a checkpoint, -> what a feature network and a judge say of them, on a pool.

Generation, decoding and features stay on an actor's device. Each finished range of images is stored, so that an
evaluation which is started again goes on, and counted by index, so that none counts twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from safetensors import SafetensorError
from safetensors import torch as safetensors

from dico_ray import cluster, pool
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.image_sets import UNKNOWN, ImageSet
from dico_ray.data.latents import fill_up
from dico_ray.metrics import FeatureNetwork, Features, ImageClassifier, Statistics, uint8_to_signed
from dico_ray.progress import Progress
from dico_ray.reading import ImageReaders
from dico_ray.sample import SampleActor
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint

PARTS = "evaluation-parts"
RANGES_AT_ONCE = 3  # at an actor: one is judged while another is read, and a third stored and told
Piece = tuple[str, int, int]


@dataclass(frozen=True)
class Made:
    """Images 0 to sample.count - 1 of a checkpoint, generated where they are judged."""

    config: Config
    checkpoint: Checkpoint

    @property
    def count(self) -> int:
        return self.config.sample.count

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.checkpoint.about["classes"])


Source = ImageSet | Made


@dataclass(frozen=True)
class Judges:
    """The feature network, and the classifier that reads images as classes, if any."""

    network: FeatureNetwork
    classifier: ImageClassifier | None = None


@dataclass(frozen=True)
class Part:
    """What is found of a range of images: features; labels (N,) and as what the judge read them (N,), or None."""

    features: Features
    labels: torch.Tensor
    read: torch.Tensor | None = None

    @classmethod
    def join(cls, parts: list[Part]) -> Part:
        """Of the first part's images, then the second's, and so on; at least one part."""
        read = [part.read for part in parts if part.read is not None]
        return cls(
            Features.join([part.features for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat(read) if read else None,
        )

    def cpu(self) -> Part:
        """On the host, features in float32."""
        return Part(self.features.cpu(), self.labels.cpu(), None if self.read is None else self.read.cpu())

    def to_bytes(self) -> bytes:
        found = {"pool": self.features.pool, "spatial": self.features.spatial, "logits": self.features.logits,
                 "labels": self.labels, "read": self.read}  # fmt: skip
        return safetensors.save({name: tensor.contiguous() for name, tensor in found.items() if tensor is not None})

    @classmethod
    def from_bytes(cls, data: bytes) -> Part:
        found = safetensors.load(data)
        return cls(
            Features(found["pool"], found.get("spatial"), found.get("logits")), found["labels"], found.get("read")
        )


class Total:
    """What is known of one source: statistics, and how the judge read each class."""

    def __init__(self, every: int, classes: int) -> None:
        self.statistics = Statistics(every)
        self.right = np.zeros(classes, np.int64)
        self.seen = np.zeros(classes, np.int64)

    def add(self, start: int, part: Part) -> None:
        """Takes in the images from `start` on.

        Raises UserError for features that are not finite, ValueError if an image is in already.
        """
        for found in (part.features.pool, part.features.spatial):
            if found is not None and not found.isfinite().all():
                first = start + int((~found.flatten(1).isfinite()).any(dim=1).nonzero()[0])
                raise UserError(
                    f"the features of image {first} are not finite: look at it (a sampler that diverged gives such), "
                    "then at codec.precision, sample.precision and evaluate.precision"
                )
        self.statistics.add(start, part.features)
        if part.read is not None:
            known = part.labels != UNKNOWN
            labels, right = part.labels[known].numpy(), (part.read == part.labels)[known].numpy()
            np.add.at(self.seen, labels, 1)
            np.add.at(self.right, labels, right.astype(np.int64))


class EvaluateActor:
    """Holds the networks; turns ranges of images into Parts, and stores them."""

    def __init__(
        self, config: Config, judges: Judges, sources: dict[str, Source], parts: dict[str, Storage], gpu: bool,
        sampler: SampleActor | None = None,
    ) -> None:  # fmt: skip
        """sampler: what makes images; unset: one of its own is made where one is needed."""
        cluster.quiet()
        self._config, self._sources, self._parts, self._gpu = config, sources, parts, gpu
        self.device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
        network: Any = judges.network
        self._network = network.to(self.device, memory_format=torch.channels_last)
        self._compiled = gpu and config.evaluate.compile
        self._largest = 0
        if self._compiled:
            self._network.compile(dynamic=False)
        self._classifier = judges.classifier.to(self.device) if judges.classifier else None
        self._sampler = sampler
        stored = any(isinstance(source, ImageSet) for source in sources.values())
        self.readers = ImageReaders(config.resources.actor_cpus, partial(_room, gpu)) if stored else None
        self._device_is_free = threading.Lock()

    @torch.inference_mode()
    def work(self, piece: Piece) -> Part:
        """Several threads may be in it: while one judges its range, others read the next one and store the last one."""
        which, start, stop = piece
        source = self._sources[which]
        if isinstance(source, Made):
            batches = self._generated(source, start, stop)
        else:
            batches = self._read(source, start, stop)
        with self._device_is_free:
            found = Part.join([self.judge(which, pixels, labels) for pixels, labels in batches])
        part = found.cpu()  # once a range, so that the device's next batch is there before one is finished
        self._parts[which].write(part_name(start, stop), part.to_bytes())
        return part

    def _read(self, source: ImageSet, start: int, stop: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Batches of stored images, which are being read and decoded from now on."""
        assert self.readers
        cuts = [(start + low, start + high) for low, high in self._cuts(stop - start)]
        labels = (torch.tensor(source.labels[low:high]) for low, high in cuts)
        return zip(self.readers.batches(source, cuts), labels, strict=True)

    def _generated(self, source: Made, start: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._sampler = self._sampler or SampleActor(source.config, source.checkpoint, self._gpu)
        for low, high in pool.ranges(stop - start, source.config.sample.batch_size):
            pixels, labels = self._sampler.generate_on_device(start + low, start + high)
            for first, last in self._cuts(len(pixels)):
                yield pixels[first:last], labels[first:last].cpu()

    def _cuts(self, count: int) -> list[pool.Range]:
        return pool.ranges(count, self._config.evaluate.batch_size)

    @torch.inference_mode()
    def judge(self, which: str, pixels: np.ndarray | torch.Tensor, labels: torch.Tensor) -> Part:
        """What is found of uint8 pixels (B, H, W, 3) with labels (B,), on the device, which may still be at it.

        Raises ConfigError for another size.
        """
        images = torch.as_tensor(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        self._check_size(which, images, self._network.image_size, "feature network")
        precision = self._config.evaluate.precision
        half = torch.autocast(self.device.type, torch.float16, enabled=self._gpu and precision == "fp16")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"), half:
            features = self._network(self._whole(images)).first(len(images))
        if self._classifier is None:
            return Part(features, labels)
        self._check_size(which, images, self._classifier.config.image_size, "judge")
        return Part(features, labels, self._classifier(uint8_to_signed(images)).argmax(1))

    def _whole(self, images: torch.Tensor) -> torch.Tensor:
        """A batch as a compiled network takes it, which is made for each size: filled up to the largest yet."""
        if not self._compiled:
            return images
        self._largest = max(self._largest, len(images))
        return fill_up(images, self._largest)

    def _check_size(self, which: str, images: torch.Tensor, size: int | None, network: str) -> None:
        height, width = images.shape[2:]
        if size is not None and (height, width) != (size, size):
            raise ConfigError(
                f"evaluate.{which}: the images are {width}x{height} pixels, the {network} takes {size}x{size}; "
                f"set evaluate.image_size {size}, or name images of that size"
            )


def _room(pinned: bool, shape: tuple[int, ...]) -> np.ndarray:
    """For pixels; pinned, from where they are copied to a GPU without a wait."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy()


@contextmanager
def few_threads() -> Iterator[None]:
    """Arithmetic by four threads, or by a quarter of those that this process has.

    All of them would wait for each other on CPUs that decode images: on 16, an evaluation from files fell from 2,500
    to 1,300 images/s by its sums of statistics.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(min(4, threads), threads // 4))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def range_size(config: Config, source: Source) -> int:
    """evaluate.range_size, in whole batches where images are made: a part of one takes as long as all of it."""
    size = config.evaluate.range_size
    if not isinstance(source, Made):
        return size
    batch = source.config.sample.batch_size
    return max(1, size // batch) * batch


def part_name(start: int, stop: int) -> str:
    return f"{start:09d}-{stop:09d}.safetensors"


def stored_parts(storage: Storage) -> dict[pool.Range, Part]:
    """The finished ranges that an earlier evaluation left, none overlapping another."""
    found: dict[pool.Range, Part] = {}
    at = 0
    for name in storage.names(".safetensors"):
        start, stop = (int(number) for number in name.partition(".")[0].split("-"))
        if start < at:
            continue
        try:
            part = Part.from_bytes(storage.read(name))
        except SafetensorError:  # damaged: its images are done again
            continue
        if len(part.labels) == stop - start:
            found[start, stop] = part
            at = stop
    return found


def key_of(identity: Mapping[str, Any]) -> str:
    """A name for what was measured of what: of all that moves it."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def measure(
    config: Config, judges: Judges, sources: dict[str, Source], parts: dict[str, Storage], every: dict[str, int],
    show: bool = True,
) -> dict[str, Total]:  # fmt: skip
    """All sources through one pool, which a connected Ray runs; what their `parts` hold already is not done again.

    every: features are kept of every so many images. show: a progress line. Raises UserError.
    """
    totals = {which: Total(every[which], len(source.classes)) for which, source in sources.items()}
    work: list[Piece] = []
    for which, source in sources.items():
        for (start, _), part in stored_parts(parts[which]).items():
            totals[which].add(start, part)
        done = totals[which].statistics.ranges
        work += [(which, *one) for one in pool.remaining(source.count, done, range_size(config, source))]
    if not work:
        return totals
    gpu = cluster.uses_gpu(config.resources)
    if config.evaluate.precision != "fp32" and not gpu:
        raise ConfigError(
            f"evaluate.precision: {config.evaluate.precision} is a GPU's, and this runs on CPUs; take fp32"
        )
    cluster.require_pool(config.resources, gpu)
    networks, images = ray.put(judges), ray.put(sources)
    actor = ray.remote(EvaluateActor).options(
        **cluster.actor_options(config.resources, gpu), max_concurrency=RANGES_AT_ONCE
    )
    whole = sum(source.count for source in sources.values())
    finished = whole - sum(stop - start for _, start, stop in work)
    reads, makes = (any(isinstance(sources[which], kind) for which, *_ in work) for kind in (ImageSet, Made))
    ahead = 1 if makes else RANGES_AT_ONCE - 1  # what takes minutes to make is better left to who is free first
    with (
        Progress("evaluate", whole, "images", finished) if show else nullcontext() as progress,
        few_threads() if reads else nullcontext(),
    ):
        for (which, start, stop), part in pool.run(
            lambda: actor.remote(config, networks, images, parts, gpu), config.resources.actors, work, ahead=ahead
        ):
            totals[which].add(start, part)
            finished += stop - start
            if progress:
                progress.update(finished)
    return totals
