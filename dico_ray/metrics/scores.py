"""Inception score, precision and recall, as ADM's evaluator (arXiv 2105.05233) defines them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROWS = 2048  # of a block of distances: 2048 x 8192 float64 are 134 MB
_COLUMNS = 8192


def inception_score(logits: np.ndarray | Tensor, split_size: int = 5000) -> float:
    """Mean over consecutive splits of exp E_x KL(p(y|x) || p(y)); arXiv 1606.03498.

    Rows are taken in their order, and a shorter last split counts as much as the others, as in ADM's evaluator:
    the score of images sorted by label is too low, since a split then holds few of the classes.

    Args:
        logits: (N, C) of any real type, without the last layer's bias where published numbers are compared.
        split_size: rows of a split; FID-50K's is 5000.

    Raises:
        ValueError: another shape, no rows, or a NaN or infinity.
    """
    values = torch.as_tensor(logits)
    if values.ndim != 2 or 0 in values.shape or split_size < 1:
        raise ValueError(f"logits have shape {tuple(values.shape)}, split_size is {split_size}; expected (N, C), >= 1")
    scores = []
    for part in values.split(split_size):
        log_p = part.to(torch.float64).log_softmax(dim=1)
        if not log_p.isfinite().all():
            raise ValueError("the logits hold a NaN or infinity: look at the images (a sampler that diverged)")
        log_mean = log_p.logsumexp(dim=0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: np.ndarray | Tensor, generated: np.ndarray | Tensor, k: int = 3, device: str | torch.device | None = None
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eq. (1) and (2)), in float64 and bounded memory.

    A set's manifold is the union of balls around its features, each as wide as the distance to its k-th nearest
    other feature of the set. Precision: share of generated features within the reference's manifold; recall: the
    share of reference features within the generated one.

    Args:
        reference, generated: features (N, D) and (M, D), N and M > k.
        k: neighbours, not counting the feature itself; ADM takes 3.
        device: where to compute; unset: a GPU if there is one. Holds both sets in float32, and one block of distances.

    Raises:
        ValueError: shapes that do not fit each other, too few rows, or a NaN or infinity.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    real, made = torch.as_tensor(reference), torch.as_tensor(generated)
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(
            f"features have shapes {tuple(real.shape)} and {tuple(made.shape)}; expected (N, D) and (M, D)"
        )
    if k < 1 or min(len(real), len(made)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} features in each set, not {len(real)} and {len(made)}")
    if not (real.isfinite().all() and made.isfinite().all()):
        raise ValueError("the features hold a NaN or infinity: look at the images (a sampler that diverged)")
    real, made = real.to(place), made.to(place)
    return _covered(made, real, _radii(real, k)), _covered(real, made, _radii(made, k))


def _squares(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (R, C), float64. The rounding of this form is 1e-16 of the norms: radii stay apart."""
    a, b = rows.to(torch.float64), columns.to(torch.float64)
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return torch.addmm(norms, a, b.T, alpha=-2).clamp_(min=0)


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each feature to its k-th nearest other one."""
    found = []
    for rows in features.split(_ROWS):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=features.device)
        for columns in features.split(_COLUMNS):
            both = torch.cat([nearest, _squares(rows, columns)], dim=1)
            # Each row is its own nearest, at distance 0: k others are k + 1 in all.
            nearest = both.topk(min(k + 1, both.shape[1]), dim=1, largest=False).values
        found.append(nearest[:, k])
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points that lie within a ball around one of the centres."""
    inside = 0
    for rows in points.split(_ROWS):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, limits in zip(centres.split(_COLUMNS), radii.split(_COLUMNS), strict=True):
            hit |= (_squares(rows, columns) <= limits).any(dim=1)
        inside += int(hit.sum())
    return inside / len(points)
