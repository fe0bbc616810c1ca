"""The door `evaluate`: images -> Frechet distance to a reference, on a pool of actors.

Actors turn ranges of images into float64 moments; moments merge, so the pool's size and order do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
import xxhash

from dico_ray import __version__, cluster, pool
from dico_ray.config import Config, ConfigError
from dico_ray.data.images import ImageFolder, load_image
from dico_ray.metrics.classifier import ImageClassifier, load_classifier, uint8_to_signed
from dico_ray.metrics.stats import Moments, frechet_distance
from dico_ray.progress import Progress
from dico_ray.sample import IMAGES, RECORD, output_folder
from dico_ray.storage import Storage

RESULT = "evaluation.json"
Piece = tuple[str, int, int]


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray evaluate`: writes the distance, the judge's rates and all that they rest on as JSON.

    Raises ConfigError for missing images, networks or a reference of other classes, before anything starts.
    """
    images = Storage(config.evaluate.images) if config.evaluate.images else output_folder(config).at(IMAGES)
    reference = _required(config.evaluate.reference, "evaluate.reference", "a folder of real images by class")
    features = _classifier(config.evaluate.features, "evaluate.features")
    judge = _classifier(config.evaluate.judge, "evaluate.judge") if config.evaluate.judge else None
    folders = {
        "images": ImageFolder.scan(images, "evaluate.images"),
        "reference": ImageFolder.scan(Storage(reference), "evaluate.reference"),
    }
    if judge and folders["images"].classes != folders["reference"].classes:
        raise ConfigError(
            f"evaluate.images has the classes {', '.join(folders['images'].classes)}; evaluate.reference has "
            f"{', '.join(folders['reference'].classes)}; name a reference of the same classes"
        )
    record = provenance(config, images, Storage(reference), features, judge, folders)
    target, name = result_file(config)
    if target.exists(name) and json.loads(target.read(name)).get("provenance") == record:
        print(f"evaluate: {target.path(name)} has this result: nothing to do")
        return
    cluster.connect(verbose, config.run.name)
    totals = _measure(config, folders, {"images": images, "reference": Storage(reference)})
    result = {
        "frechet_distance": frechet_distance(*totals["images"].compute(), *totals["reference"].compute()),
        "comparable_with_published_fid": False,
        "features": features.config.name,
        "images": len(folders["images"].paths),
        "reference_images": len(folders["reference"].paths),
        "judge": _judge_rates(judge, totals, folders["images"].classes),
        "provenance": record,
    }
    target.write(name, json.dumps(result, indent=1).encode())
    _tell(result, target.path(name))


def _required(value: str, setting: str, what: str) -> str:
    if not value:
        raise ConfigError(f"{setting} is unset; name {what}")
    return value


def _classifier(path: str, setting: str) -> ImageClassifier:
    try:
        return load_classifier(_required(path, setting, "a classifier's .safetensors file"))
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{setting}: {error}") from None


def result_file(config: Config) -> tuple[Storage, str]:
    """Where the result goes: a folder, and a name in it."""
    if not config.evaluate.output:
        return Storage(config.run.folder), RESULT
    folder, _, name = config.evaluate.output.rpartition("/")
    return Storage(folder), name


def provenance(
    config: Config, images: Storage, reference: Storage, features: ImageClassifier, judge: ImageClassifier | None,
    folders: dict[str, ImageFolder],
) -> dict[str, Any]:  # fmt: skip
    """Every choice that moves the numbers. Images are named by their record where `sample` left one."""
    made = Storage(images.url.rpartition("/")[0])
    return {
        "images": images.url,
        "samples": json.loads(made.read(RECORD)) if made.exists(RECORD) else None,
        "image_names": _names_hash(folders["images"]),
        "reference": reference.url,
        "reference_names": _names_hash(folders["reference"]),
        "features": _weights_hash(features),
        "judge": _weights_hash(judge) if judge else None,
        "versions": {"dico_ray": __version__, "torch": torch.__version__},
    }


def _names_hash(folder: ImageFolder) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(folder.paths).encode())


def _weights_hash(model: ImageClassifier) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class Totals:
    """What is known of one folder: feature moments, and how the judge read each class. They merge."""

    def __init__(self, dim: int, classes: int) -> None:
        self.moments = Moments(dim)
        self.right = np.zeros(classes, np.int64)
        self.seen = np.zeros(classes, np.int64)

    def merge(self, other: Totals) -> None:
        self.moments = self.moments.merge(other.moments)
        self.right = self.right + other.right  # not in place: what comes from Ray's object store is read-only
        self.seen = self.seen + other.seen

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        return self.moments.compute()


def _measure(config: Config, folders: dict[str, ImageFolder], storages: dict[str, Storage]) -> dict[str, Totals]:
    """Both folders through one pool."""
    gpu = cluster.uses_gpu(config.resources)
    actors = config.resources.actors
    cluster.require(
        actors * config.resources.actor_cpus, actors if gpu else 0, f"a pool of {actors} actors", "resources.actors"
    )
    actor = ray.remote(JudgeActor).options(num_cpus=config.resources.actor_cpus, num_gpus=1 if gpu else 0)
    work: list[Piece] = [
        (which, start, stop)
        for which, folder in folders.items()
        for start, stop in pool.ranges(len(folder.paths), config.evaluate.batch_size)
    ]
    totals: dict[str, Totals] = {}
    done = 0
    with Progress("evaluate", sum(len(f.paths) for f in folders.values()), "images") as progress:
        for (which, start, stop), part in pool.run(lambda: actor.remote(config, folders, storages, gpu), actors, work):
            if which in totals:
                totals[which].merge(part)
            else:
                totals[which] = part
            done += stop - start
            progress.update(done)
    return totals


class JudgeActor:
    """Holds the feature network and the judge; turns ranges of images into Totals."""

    def __init__(
        self, config: Config, folders: dict[str, ImageFolder], storages: dict[str, Storage], gpu: bool
    ) -> None:
        cluster.quiet()
        self._device = torch.device("cuda" if gpu else "cpu")
        if not gpu:
            torch.set_num_threads(config.resources.threads or max(1, int(config.resources.actor_cpus)))
        self._features = load_classifier(config.evaluate.features).to(self._device)
        self._judge = load_classifier(config.evaluate.judge).to(self._device) if config.evaluate.judge else None
        self._folders, self._storages = folders, storages

    @torch.inference_mode()
    def work(self, piece: Piece) -> Totals:
        which, start, stop = piece
        folder = self._folders[which]
        pixels = uint8_to_signed(torch.from_numpy(self._load(which, folder.paths[start:stop]))).to(self._device)
        images = pixels.permute(0, 3, 1, 2)
        features = self._features.features(images)
        totals = Totals(features.shape[1], len(folder.classes))
        totals.moments.add(features)
        if self._judge is not None:
            labels = np.asarray(folder.labels[start:stop])
            read = self._judge(images).argmax(1).cpu().numpy()
            np.add.at(totals.seen, labels, 1)
            np.add.at(totals.right, labels, (read == labels).astype(np.int64))
        return totals

    def _load(self, which: str, paths: Sequence[str]) -> np.ndarray:
        """uint8 (N, H, W, 3). Raises ConfigError if an image is not of the network's size."""
        size = self._features.config.image_size
        storage = self._storages[which]
        images = [np.asarray(load_image(storage.read(path), path)) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.shape != (size, size, 3):
                raise ConfigError(
                    f"evaluate.{which}: {path} is {image.shape[1]}x{image.shape[0]} pixels, the feature network takes "
                    f"{size}x{size}; name images of that size"
                )
        return np.stack(images)


def _judge_rates(
    judge: ImageClassifier | None, totals: dict[str, Totals], classes: Sequence[str]
) -> dict[str, Any] | None:
    """The share of images read as their class: of those judged, of real ones, and by class."""
    if judge is None:
        return None
    rate = {which: float(total.right.sum() / total.seen.sum()) for which, total in totals.items()}
    by_class = totals["images"].right / np.maximum(totals["images"].seen, 1)
    return {"name": judge.config.name, **rate, "by_class": dict(zip(classes, by_class.tolist(), strict=True))}


def _tell(result: dict[str, Any], path: str) -> None:
    print(
        f"evaluate: Frechet distance {result['frechet_distance']:.3f} ({result['images']} images, "
        f"{result['reference_images']} real ones, features {result['features']}: not comparable with published FIDs)"
    )
    if result["judge"]:
        judge = result["judge"]
        print(f"evaluate: the judge reads {judge['images']:.1%} as their class; {judge['reference']:.1%} of real ones")
    print(f"evaluate: {path}")
