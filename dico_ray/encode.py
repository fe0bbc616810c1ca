"""The door `encode`: images -> Ray Data over an actor pool -> latent shards and their manifest.

A shard is the unit of work: an actor reads its images, encodes them with both flips and writes it whole. What
a shard holds depends on the images and settings alone, never on the pool; finished shards are not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray.data
import xxhash

from dico_ray import cluster
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.images import ImageError, center_crop, load_image
from dico_ray.data.shards import MANIFEST, Manifest, Shard, sample_bytes, write_shard
from dico_ray.data.sources import ImageSource, Piece
from dico_ray.progress import Progress
from dico_ray.storage import Storage

_PARTS = "parts"  # a finished shard's record, until the manifest holds all of them
_DECODERS = 8


@dataclass(frozen=True)
class ShardPlan:
    """One shard's work: images [start, stop) of each of these pieces. Keys count on from `first`."""

    name: str
    first: int
    pieces: tuple[tuple[Piece, int, int], ...]

    @property
    def count(self) -> int:
        return sum(stop - start for _, start, stop in self.pieces)

    @property
    def labels(self) -> list[int]:
        return [label for piece, start, stop in self.pieces for label in piece.labels[start:stop]]


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray encode`: encode.images -> data.latents.

    Raises ConfigError for missing images or an autoencoder that does not fit; images that cannot be decoded
    are left out and named in the manifest.
    """
    if not config.encode.images:
        raise ConfigError("encode.images is unset; name a folder of images with one subfolder per class")
    source, target = Storage(config.encode.images), Storage(config.data.latents)
    images = ImageSource.scan(source, "encode.images")
    began = _fingerprint(config, images)
    if target.exists(MANIFEST):
        _check_same(config, target, began)
        print(f"encode: {config.data.latents} is complete: nothing to do")
        return
    plans = plan_shards(config, images)
    done = _finished(target, began)
    cluster.connect(verbose, config.run.name)
    gpu = cluster.uses_gpu(config.resources)
    cluster.require_pool(config.resources, gpu)
    left = [plan for plan in plans if plan.name not in done]
    _run(config, images, left, gpu, began)
    records = _finished(target, began)
    manifest = _manifest(config, images, [records[plan.name] for plan in plans])
    _check_skipped(config, len(manifest.skipped))
    target.write(MANIFEST, manifest.to_json().encode())
    target.remove(_PARTS)
    lost = f", {len(manifest.skipped)} images could not be read" if manifest.skipped else ""
    print(f"encode: {manifest.count} samples in {len(manifest.shards)} shards at {target.url}{lost}")


def plan_shards(config: Config, source: ImageSource) -> list[ShardPlan]:
    """Cuts the images into shards after a seeded shuffle of the source's pieces, so that each holds many classes."""
    order = np.random.Generator(np.random.Philox(config.run.seed)).permutation(len(source.pieces))
    plans: list[ShardPlan] = []
    parts: list[tuple[Piece, int, int]] = []
    room = size = config.encode.shard_samples

    def finish() -> None:
        plans.append(ShardPlan(f"shard-{len(plans):05d}.tar", len(plans) * size, tuple(parts)))
        parts.clear()

    for piece in (source.pieces[i] for i in order):
        start = 0
        while start < len(piece.labels):
            stop = min(start + room, len(piece.labels))
            parts.append((piece, start, stop))
            room -= stop - start
            start = stop
            if not room:
                finish()
                room = size
    if parts:
        finish()
    return plans


def _fingerprint(config: Config, source: ImageSource) -> str:
    """Of everything that the shards' bytes follow from, but for the images' own."""
    settings = {
        "encode": config.encode.model_dump(exclude={"batch_size", "max_skipped"}),
        "codec": config.codec.model_dump(exclude={"compile"}),
    }
    facts = [settings, config.run.seed, [(p.file, p.start, p.stop, p.labels) for p in source.pieces]]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _check_same(config: Config, target: Storage, fingerprint: str) -> None:
    if Manifest.load(target).codec.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"data.latents: {target.url} was encoded from other images or settings; name another folder or remove it"
        )


def _finished(target: Storage, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Records of finished shards by name. Raises ConfigError for those of another encode."""
    records = [json.loads(target.read(name)) for name in target.names(".json") if name.startswith(_PARTS)]
    if any(record["fingerprint"] != fingerprint for record in records):
        raise ConfigError(
            f"data.latents: {target.url} holds a part of other images or settings; name another folder or remove it"
        )
    return {record["shard"]["name"]: record for record in records}


def _run(config: Config, source: ImageSource, plans: list[ShardPlan], gpu: bool, fingerprint: str) -> None:
    done = source.count - sum(plan.count for plan in plans)
    skipped = 0
    if not plans:
        return
    pool = ray.data.from_items([{"plan": plan} for plan in plans], override_num_blocks=len(plans)).map_batches(
        ShardEncoder,
        fn_constructor_kwargs={"config": config, "source": ray.put(source), "fingerprint": fingerprint, "gpu": gpu},
        batch_size=1,
        concurrency=min(config.resources.actors, len(plans)),
        num_cpus=config.resources.actor_cpus,
        num_gpus=config.resources.actor_gpus if gpu else 0,
    )
    with Progress("encode", source.count, "images", done) as progress:
        for row in pool.iter_rows():
            done += row["images"]
            if row["failed"]:
                raise UserError(row["failed"])
            skipped += row["skipped"]
            _check_skipped(config, skipped)
            progress.update(done)


def _check_skipped(config: Config, skipped: int) -> None:
    limit = config.encode.max_skipped
    if limit is not None and skipped > limit:
        raise ImageError(
            f"{skipped} images cannot be read, more than encode.max_skipped = {limit}; raise it, or mend the images "
            "and remove the folder of the shards"
        )


class ShardEncoder:
    """An actor of the pool: holds the autoencoder, turns one ShardPlan into one shard and its record."""

    def __init__(self, config: Config, source: Any, fingerprint: str, gpu: bool) -> None:
        """source: a reference to the ImageSource."""
        import torch

        from dico_ray.data.latents import Autoencoder

        cluster.quiet()
        self._config, self._fingerprint = config, fingerprint
        self._images: ImageSource = ray.get(source)
        self._source, self._target = Storage(config.encode.images), Storage(config.data.latents)
        if not gpu:
            torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
        device = torch.device("cuda" if gpu else "cpu")
        self._vae = Autoencoder(config.codec.vae, config.codec.precision, device, gpu and config.codec.compile)
        self._codec = {**self._vae.describe(), "fingerprint": fingerprint}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A shard's numbers of images and of those left out; failed: why it could not be made, where that is known.

        Ray Data would wrap an error in its own, with a trace.
        """
        try:
            images, skipped = self._make(batch["plan"][0])
        except UserError as error:
            return {"images": [0], "skipped": [0], "failed": [str(error)]}
        return {"images": [images], "skipped": [skipped], "failed": [""]}

    def _make(self, plan: ShardPlan) -> tuple[int, int]:
        encode = self._config.encode
        good: list[int] = []
        bad: list[str] = []

        def readable(loaded: Iterable[tuple[str, np.ndarray | str]]) -> Iterator[tuple[str, np.ndarray]]:
            for i, (name, image) in enumerate(loaded):
                if isinstance(image, str):
                    bad.append(image)
                else:
                    good.append(i)
                    yield name, image

        with ThreadPoolExecutor(_DECODERS) as pool:  # they read on while the first images are encoded
            images = readable(image for part in pool.map(self._load, plan.pieces) for image in part)
            parts = []
            while some := list(islice(images, encode.batch_size)):
                parts.append(self._encode([image for _, image in some], [name for name, _ in some]))
        if not parts:
            raise ImageError(f"none of the {plan.count} images of {plan.name} can be read: {bad[0]}")
        latents = self._gather(plan, parts)
        keys = [f"{plan.first + i:09d}" for i in good]
        chunk = max(1, encode.chunk_bytes // sample_bytes(*latents.shape[2:]))
        labels = plan.labels
        shard = write_shard(self._target, plan.name, keys, latents, [labels[i] for i in good], chunk)
        self._record(shard, latents, chunk, bad)
        return plan.count, plan.count - len(good)

    def _load(self, part: tuple[Piece, int, int]) -> list[tuple[str, np.ndarray | str]]:
        """(name, pixels (size, size, 3) or why there are none) of each image of a part of a piece."""
        piece, start, stop = part
        found: list[tuple[str, np.ndarray | str]] = []
        for name, data in self._images.read(self._source, piece)[start:stop]:
            try:
                found.append((name, center_crop(load_image(data, name), self._config.encode.image_size)))
            except ImageError as error:
                found.append((name, str(error)))
        return found

    def _gather(self, plan: ShardPlan, parts: list[Any]) -> np.ndarray:
        """A shard's latents on the host, float16. Raises UserError for such as are not finite."""
        import torch

        latents = torch.cat(parts)
        if not latents.isfinite().all():
            precision = self._config.codec.precision
            raise UserError(
                f"codec.precision: fp16, but latents of {plan.name} are not finite; take bf16 or fp32"
                if precision == "fp16"
                else f"codec.vae: latents of {plan.name} are not finite in float16: its weights are broken, "
                "or their scale is not this autoencoder's"
            )
        return latents.cpu().numpy()

    def _encode(self, images: list[Any], paths: list[str]) -> Any:
        """Plain and mirrored: the mirrored latents are of the mirrored pixels. -> (B, 2, C, H, W) float16.

        C counts mean and log variance if encode.store says moments. A tensor on the device, which is not waited for:
        a shard's latents are small.
        """
        import torch

        pixels = self._vae.to_device(np.stack(images))
        pair = [self._latents(p, paths, flip) for flip, p in enumerate((pixels, pixels.flip(2)))]
        return torch.stack(pair, dim=1).half()

    def _latents(self, pixels: Any, paths: list[str], flip: int) -> Any:
        """A posterior's draw is keyed by the image's own path: the same in any batch, shard and pool."""
        from dico_ray.data.latents import draw_posterior
        from dico_ray.diffusion.noise import Stream, normal

        moments, store = self._vae.encode(pixels), self._config.encode.store
        if store == "sample":
            rows = self._vae.to_device(np.array([xxhash.xxh32_intdigest(path.encode()) for path in paths], np.int64))
            shape = (self._vae.channels, *moments.shape[2:])
            latents = draw_posterior(moments, normal(self._config.run.seed, Stream.POSTERIOR, flip, rows, shape))
        else:
            latents = moments if store == "moments" else moments[:, : self._vae.channels]
        return latents

    def _record(self, shard: Shard, latents: np.ndarray, chunk: int, skipped: list[str]) -> None:
        values = latents.astype(np.float64)
        sums = {"sum": values.sum((0, 1, 3, 4)).tolist(), "squares": (values**2).sum((0, 1, 3, 4)).tolist()}
        record = {
            "shard": asdict(shard), "fingerprint": self._fingerprint, "codec": self._codec, "skipped": skipped,
            "chunk_samples": chunk, "shape": latents.shape[2:], **sums,
        }  # fmt: skip
        self._target.write(f"{_PARTS}/{shard.name}.json", json.dumps(record).encode())


def _manifest(config: Config, source: ImageSource, records: list[dict[str, Any]]) -> Manifest:
    channels, height, width = records[0]["shape"]
    shards = tuple(Shard.from_json(r["shard"]) for r in records)
    values = sum(s.count for s in shards) * 2 * height * width
    mean = np.sum([r["sum"] for r in records], axis=0) / values
    variance = np.sum([r["squares"] for r in records], axis=0) / values - mean**2
    return Manifest(
        shards=shards,
        chunk_samples=records[0]["chunk_samples"],
        sample_bytes=sample_bytes(channels, height, width),
        channels=channels,
        latent_size=(height, width),
        classes=source.classes,
        image_size=config.encode.image_size,
        codec=records[0]["codec"],
        statistics={"mean": mean.tolist(), "std": np.sqrt(variance).tolist()},
        skipped=tuple(reason for r in records for reason in r["skipped"]),
        content="moments" if config.encode.store == "moments" else "latents",
    )
