"""A result's numbers from what was measured, its label, and how two results differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dico_ray.metrics.features import FeatureNetwork, Statistics
from dico_ray.metrics.inception import PUBLISHED
from dico_ray.metrics.reference import Reference
from dico_ray.metrics.scores import inception_score
from dico_ray.metrics.stats import frechet_distance

_PUBLISHED_IMAGES = 50_000
_NUMBERS = ("frechet_distance", "fid", "sfid", "inception_score", "precision", "recall")


def distances(network: FeatureNetwork, images: Statistics, reference: Reference, split_size: int) -> dict[str, Any]:
    """FID (arXiv 1706.08500), sFID (2103.03841) and inception score (1606.03498); `missing` says why one is None.

    Raises ValueError if the reference is of another network.
    """
    assert images.pool is not None and reference.pool is not None
    distance = frechet_distance(*images.pool.compute(), *reference.pool)
    found: dict[str, Any] = {"frechet_distance": distance, "fid": None, "sfid": None, "inception_score": None}
    missing: dict[str, str] = {}
    if network.is_inception:
        found["fid"] = distance
    else:
        missing["fid"] = f"the features are those of {network.name}, not Inception's"
    if images.spatial is None:
        missing["sfid"] = f"{network.name} has no spatial features"
    elif reference.spatial is None:
        missing["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
    else:
        found["sfid"] = frechet_distance(*images.spatial.compute(), *reference.spatial)
    logits = images.logits()
    if logits is None:
        missing["inception_score"] = f"{network.name} has no logits for it"
    else:
        found["inception_score"] = inception_score(logits, split_size)
    return {**found, "missing": missing}


def label(network: FeatureNetwork, images: int) -> str:
    """`FID-50K`: a distance of fewer images is larger, and another number."""
    if not network.is_inception:
        return f"Frechet distance on {network.name}, {images} images"
    return f"FID-{images // 1000}K" if images % 1000 == 0 else f"FID-{images}"


def comparable(network: FeatureNetwork, images: int) -> bool:
    """Whether network and number of images are those of published FIDs; the reference is the reader's to judge."""
    return network.is_inception and network.name == PUBLISHED and images >= _PUBLISHED_IMAGES


def warnings(network: FeatureNetwork, images: Statistics, reference: Reference, sorted_by_label: bool) -> list[str]:
    """What makes the numbers other than they look."""
    assert images.pool is not None
    found, dim = [], images.pool.dim
    for what, count in (("images", images.count), ("reference images", reference.images)):
        if 0 < count <= dim:
            found.append(
                f"{count} {what} are too few for {dim} features: the covariance is singular, the distance biased"
            )
    if sorted_by_label and images.logits() is not None:
        found.append("the images are sorted by label: the inception score's splits hold few classes, so it is too low")
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what of the provenance differs, how the numbers compare), a line each."""
    made = [dict(_flat(one.get("provenance", {}))) for one in (first, second)]
    choices = [
        f"{name}: {made[0].get(name, 'not told')} | {made[1].get(name, 'not told')}"
        for name in sorted({*made[0], *made[1]})
        if made[0].get(name, "not told") != made[1].get(name, "not told")
    ]
    numbers = []
    for name in _NUMBERS:
        values = first.get(name), second.get(name)
        if values != (None, None):
            texts = ["none" if value is None else f"{value:.6g}" for value in values]
            change = f" ({values[1] - values[0]:+.3g})" if values[0] is not None and values[1] is not None else ""
            numbers.append(f"{name}: {texts[0]} | {texts[1]}{change}")
    return choices, numbers


def _flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
