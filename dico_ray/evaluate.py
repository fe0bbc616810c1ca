"""The door `evaluate`: images, or a checkpoint -> FID, sFID, inception score, precision, recall, on a pool of actors.

The numbers are those of ADM's evaluator (arXiv 2105.05233), where the features are Inception's; what cannot be
computed is null, with the reason. The result says every choice that moves a number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
import xxhash

from dico_ray import __version__, cluster, measure
from dico_ray.config import Config, ConfigError
from dico_ray.data.generated import IMAGES, NPZ
from dico_ray.data.image_sets import ImageSet
from dico_ray.measure import Judges, Made, Source, Total
from dico_ray.metrics import FeatureNetwork, Reference, open_classifier, open_network, precision_recall, results
from dico_ray.metrics.inception import weights_hash
from dico_ray.sample import RECORD, output_folder
from dico_ray.sample import provenance as sample_provenance
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.weights import find_checkpoint

RESULT = "evaluation.json"
REFERENCES = "reference-statistics"
_BLANK = 32  # pixels; Inception takes any size
_PACKAGES = ("torch", "torchvision", "diffusers", "numpy")


@dataclass(frozen=True)
class Task:
    """An evaluation that can be done: every file was found and fits. known: the reference's given statistics."""

    judges: Judges
    images: Source
    known: Reference
    reference: ImageSet | None
    record: dict[str, Any]

    def sources(self) -> dict[str, Source]:
        return {"images": self.images} | ({"reference": self.reference} if self.reference else {})


def main(config: Config, *, verbose: bool = False, compare: Sequence[str] = ()) -> None:
    """`dico-ray evaluate`: writes the numbers and all that they rest on as JSON; `--compare A B` compares two such.

    Raises ConfigError for missing images, networks or a reference of other classes, before anything starts.
    """
    if compare:
        _compare(*compare)
        return
    task = prepare(config, *_images(config))
    target, name = result_file(config)
    if target.exists(name) and json.loads(target.read(name)).get("provenance") == task.record:
        print(f"evaluate: {target.path(name)} has this result: nothing to do")
        return
    cluster.connect(verbose, config.run.name)
    result = score(config, task)
    target.write(name, json.dumps(result, indent=1).encode())
    _tell(result, target.path(name))


def score_checkpoint(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The result for sample.count images that a checkpoint generates, each judged where it is made; Ray is connected.

    Nothing is written but finished ranges (in the run's folder, until all are done) and the reference's statistics.
    Raises UserError if it cannot be done; whoever interrupts it leaves no actor behind.
    """
    return score(config, prepare(config, Made(config, checkpoint), checkpoint), show=False)


def _images(config: Config) -> tuple[Source, Checkpoint | None]:
    """evaluate.images, else the run's samples where they are of this checkpoint and these settings, else its own.

    And the checkpoint that they are of, where it is known.
    """
    if config.evaluate.images:
        return ImageSet.scan(config.evaluate.images, "evaluate.images", config.evaluate.image_size), None
    _required(config.evaluate.reference)
    checkpoint, output = find_checkpoint(config), output_folder(config)
    record = json.loads(output.read(RECORD)) if output.exists(RECORD) else None
    stored = record == sample_provenance(config, checkpoint) and _stored_samples(config, checkpoint)
    return stored or Made(config, checkpoint), checkpoint


def _samples_url(config: Config) -> str:
    """Where `sample` puts images of this format."""
    return f"{output_folder(config).url}/{NPZ if config.sample.format == 'npz' else IMAGES}"


def _stored_samples(config: Config, checkpoint: Checkpoint) -> ImageSet | None:
    """The images that `sample` stored, whatever their format; None if they are not all there any more."""
    folder, _, name = _samples_url(config).rpartition("/")
    if not (Storage(folder).exists(name) if name == NPZ else Storage(folder).at(name).names()):
        return None
    found = ImageSet.scan(_samples_url(config), "evaluate.images", config.evaluate.image_size)
    if found.count != config.sample.count:
        return None
    if config.sample.format != "png":  # these have labels as numbers, and no names
        found = replace(found, classes=tuple(checkpoint.about["classes"]))
    return found


def _required(reference: str) -> str:
    if not reference:
        raise ConfigError("evaluate.reference is unset; name real images, or ADM's .npz of statistics")
    return reference


def prepare(config: Config, images: Source, checkpoint: Checkpoint | None) -> Task:
    """Opens and checks all that an evaluation needs; reads every stored image once, for its hash. Starts nothing.

    Raises ConfigError for what is missing or does not fit.
    """
    settings = config.evaluate
    url = _required(settings.reference)
    network = open_network(settings.features)
    judges = Judges(network, open_classifier(settings.judge, "evaluate.judge") if settings.judge else None)
    known, reference = _open_reference(config, url)
    _check_features(network, known)
    task = Task(judges, images, known, reference, {})
    for which, source in task.sources().items():
        if source.count < 2:
            raise ConfigError(f"evaluate.{which}: {source.count} image; a covariance needs at least 2")
    if judges.classifier and reference and reference.classes and reference.classes != images.classes:
        raise ConfigError(
            f"evaluate.images has the classes {', '.join(images.classes)}; evaluate.reference has "
            f"{', '.join(reference.classes)}; name a reference of the same classes"
        )
    return replace(task, record=provenance(config, task, checkpoint))


def _open_reference(config: Config, url: str) -> tuple[Reference, ImageSet | None]:
    """Given statistics, and the images that are still to be judged."""
    size = config.evaluate.image_size
    if not url.endswith(".npz"):
        return Reference(), ImageSet.scan(url, "evaluate.reference", size)
    folder, _, name = url.rpartition("/")
    try:
        with Storage(folder).file(name) as file:
            known = Reference.read(file, f"evaluate.reference: {url}")
    except FileNotFoundError:
        raise ConfigError(f"evaluate.reference: {url} is not there; name an .npz or a folder of images") from None
    if known.pool is not None and (known.features is not None or not _has_images(folder, name)):
        return known, None
    return known, ImageSet.scan(url, "evaluate.reference", size)


def _check_features(network: FeatureNetwork, known: Reference) -> None:
    """Raises ConfigError if given statistics are of other features than the network's, by a look at a blank image."""
    size = network.image_size or _BLANK
    with torch.inference_mode():
        found = network(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    pairs = {"mu": (known.pool, found.pool), "mu_s": (known.spatial, found.spatial)}
    for name, (given, own) in pairs.items():
        if given is not None and own is not None and given[0].shape != own.shape[1:]:
            raise ConfigError(
                f"evaluate.reference: its {name} is of {given[0].size} features, those of {network.name} are "
                f"{own.shape[1]}; name a reference of that network, or real images"
            )


def _has_images(folder: str, name: str) -> bool:
    with Storage(folder).file(name) as file, np.load(file, allow_pickle=False) as found:
        return "arr_0" in found.files


def result_file(config: Config) -> tuple[Storage, str]:
    """Where the result goes: a folder, and a name in it."""
    if not config.evaluate.output:
        return Storage(config.run.folder), RESULT
    folder, _, name = config.evaluate.output.rpartition("/")
    return Storage(folder), name


def provenance(config: Config, task: Task, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Every choice that moves the numbers. Images are named by their content, or by all that generates them."""
    settings, network = config.evaluate, task.judges.network
    classifier = task.judges.classifier
    images = task.images
    return {
        "images": None if isinstance(images, Made) else settings.images or _samples_url(config),
        "image_hash": None if isinstance(images, Made) else images.content_hash(),
        "count": images.count,
        "samples": _samples(config, images, checkpoint),
        "reference": settings.reference,
        "reference_hash": _reference_hash(task),
        "feature_network": network.name,
        "features": network.hash,
        "judge": weights_hash(classifier) if classifier else None,
        "feature_precision": settings.precision,
        "feature_compile": settings.compile,
        **settings.model_dump(include={"image_size", "split_size", "neighbours", "reference_features"}),
        "versions": {"dico_ray": __version__} | _versions(network),
    }


def _versions(network: FeatureNetwork) -> dict[str, str]:
    own = ("torch_fidelity",) if network.is_inception else ()
    return {name: version(name) for name in (*_PACKAGES, *own)}


def _samples(config: Config, images: Source, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """How images were generated, and of which average their weights are, where that is known."""
    if checkpoint is None:
        assert isinstance(images, ImageSet)
        folder = Storage(images.storage.url.rpartition("/")[0])
        return json.loads(folder.read(RECORD)) if folder.exists(RECORD) else None
    record, about = sample_provenance(config, checkpoint), checkpoint.about
    profile = about.get("posthoc", {}).get("sigma_rel")
    decay = "not told: imported" if "imported" in about else about["config"]["train"]["ema_decay"]
    ema = f"power function, sigma_rel {profile}" if profile else f"decay {decay}"
    return {**record, "ema": ema if record["weights"] == "ema" else None}


def _reference_hash(task: Task) -> str:
    digest = xxhash.xxh3_128((task.reference.content_hash() if task.reference else "").encode())
    for pair in (task.known.pool, task.known.spatial):
        for array in pair or ():
            digest.update(np.ascontiguousarray(array, np.float64).data)
    return digest.hexdigest()


def score(config: Config, task: Task, show: bool = True) -> dict[str, Any]:
    """The result, by a pool on the connected Ray. Raises UserError."""
    identity = {
        name: task.record[name] for name in ("features", "judge", "feature_precision", "feature_compile", "image_size")
    }
    sources, most = task.sources(), config.evaluate.reference_features
    own: dict[str, dict[str, Any]] = {
        "images": {name: task.record[name] for name in ("image_hash", "samples", "count")},
        "reference": {"hash": task.record["reference_hash"], "most": most},
    }
    labels = {which: one.labels if isinstance(one, ImageSet) else () for which, one in sources.items()}
    keys = {which: measure.key_of({**identity, **own[which], "labels": labels[which]}) for which in sources}
    cache = Storage(config.evaluate.cache or f"{config.run.storage.rstrip('/')}/{REFERENCES}")
    stored = _stored(cache, f"{keys['reference']}.npz") if task.reference else None
    if stored:
        del sources["reference"]
    parts = {which: Storage(config.run.folder).at(measure.PARTS, keys[which]) for which in sources}
    every = dict.fromkeys(sources, 1)
    if "reference" in sources:
        every["reference"] = -(-sources["reference"].count // most)
    totals = measure.measure(config, task.judges, sources, parts, every, show)
    if "reference" in totals:
        total = totals["reference"]
        stored = Reference.of(total.statistics, total.right, total.seen)
        cache.write(f"{keys['reference']}.npz", stored.to_bytes())
    result = _result(config, task, totals["images"], _joined(task.known, stored))
    for which in parts:
        Storage(config.run.folder).at(measure.PARTS).remove(keys[which])
    return result


def _stored(cache: Storage, name: str) -> Reference | None:
    if not cache.exists(name):
        return None
    with cache.file(name) as file:
        return Reference.read(file, cache.path(name))


def _joined(known: Reference, found: Reference | None) -> Reference:
    """Given statistics go before those of the images beside them: ADM's images are a part of what its are of."""
    if found is None or known.pool is None:
        return found or known
    return replace(found, pool=known.pool, spatial=known.spatial, images=known.images)


def _result(config: Config, task: Task, total: Total, reference: Reference) -> dict[str, Any]:
    network, statistics = task.judges.network, total.statistics
    numbers = results.distances(network, statistics, reference, config.evaluate.split_size)
    precision, recall, why = _precision_recall(config, total, reference)
    missing = numbers.pop("missing") | ({"precision": why, "recall": why} if why else {})
    labels = task.images.labels if isinstance(task.images, ImageSet) else ()
    ascending = len(set(labels)) > 1 and all(a <= b for a, b in pairwise(labels))
    return {
        "label": results.label(network, statistics.count),
        **numbers,
        "precision": precision,
        "recall": recall,
        "missing": missing,
        "warnings": results.warnings(network, statistics, reference, ascending),
        "comparable_with_published_fid": results.comparable(network, statistics.count),
        "features": network.name,
        "images": statistics.count,
        "reference_images": reference.images or None,
        "judge": _judge_rates(task, total, reference),
        "provenance": task.record,
    }


def _precision_recall(
    config: Config, total: Total, reference: Reference
) -> tuple[float | None, float | None, str | None]:
    """Both, or why not; on one of the pool's GPUs where it has some."""
    if reference.features is None:
        return None, None, "the reference has neither images nor features"
    made, k = total.statistics.features().numpy(), config.evaluate.neighbours
    if min(len(made), len(reference.features)) <= k:
        return None, None, f"{min(len(made), len(reference.features))} images are too few for {k} neighbours"
    if not cluster.uses_gpu(config.resources):
        return *precision_recall(reference.features, made, k, "cpu"), None
    task: Any = ray.remote(precision_recall).options(**cluster.actor_options(config.resources, gpu=True))
    return *ray.get(task.remote(reference.features, made, k, "cuda")), None


def _judge_rates(task: Task, total: Total, reference: Reference) -> dict[str, Any] | None:
    """The share of images read as their class: of those judged, of real ones, and by class. None: not known."""
    if task.judges.classifier is None:
        return None

    def rate(right: np.ndarray | None, seen: np.ndarray | None) -> float | None:
        return float(right.sum() / seen.sum()) if right is not None and seen is not None and seen.sum() else None

    by_class = total.right / np.maximum(total.seen, 1)
    return {
        "name": task.judges.classifier.config.name,
        "images": rate(total.right, total.seen),
        "reference": rate(reference.right, reference.seen),
        "by_class": dict(zip(task.images.classes, by_class.tolist(), strict=True)),
    }


def _compare(first: str, second: str) -> None:
    """Prints what two results' choices and numbers are, where they differ. Raises ConfigError for other files."""
    found = []
    for path in (first, second):
        folder, _, name = path.rpartition("/")
        try:
            result = json.loads(Storage(folder or ".").read(name))
        except FileNotFoundError:
            raise ConfigError(f"--compare {path}: is not there; name two results of evaluate") from None
        except ValueError as error:
            raise ConfigError(f"--compare {path}: not JSON ({error}); name two results of evaluate") from None
        if not isinstance(result, dict) or "provenance" not in result:
            raise ConfigError(f"--compare {path}: is no result of evaluate; name two of them")
        found.append(result)
    choices, numbers = results.differences(*found)
    print(f"evaluate: {first} | {second}")
    print("\n".join(f"  {line}" for line in numbers))
    print("evaluate: they differ in" if choices else "evaluate: they rest on the same choices")
    print("".join(f"  {line}\n" for line in choices), end="")


def _tell(result: dict[str, Any], path: str) -> None:
    comparable = "" if result["comparable_with_published_fid"] else ": not comparable with published FIDs"
    print(
        f"evaluate: Frechet distance {result['frechet_distance']:.3f} ({result['images']} images, "
        f"{result['reference_images'] or 'an unknown number of'} real ones, features {result['features']}{comparable})"
    )
    names = {"sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall"}
    told = [f"{text} {result[name]:.3f}" for name, text in names.items() if result[name] is not None]
    print(f"evaluate: {', '.join(told)}") if told else None
    if result["judge"] and result["judge"]["images"] is not None:
        judge, real = result["judge"], result["judge"]["reference"]
        beside = f"; {real:.1%} of real ones" if real is not None else ""
        print(f"evaluate: the judge reads {judge['images']:.1%} as their class{beside}")
    for warning in result["warnings"]:
        print(f"evaluate: warning: {warning}")
    print(f"evaluate: {path}")
