from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray import metrics
from dico_ray.metrics import scores

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    arrays = np.load(GOLDEN / "metrics.npz")
    return {name: arrays[name] for name in arrays.files}, json.loads((GOLDEN / "metrics.json").read_text())


def test_scores_equal_the_released_evaluators(golden: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    arrays, numbers = golden
    assert metrics.inception_score(arrays["logits"], 500) == pytest.approx(
        numbers["inception_score_split_500"], rel=1e-12
    )
    precision, recall = metrics.precision_recall(arrays["features_reference"], arrays["features_generated"], k=3)
    assert (precision, recall) == (numbers["precision_k3"], numbers["recall_k3"])


def test_scores_equal_torch_fidelitys(golden: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    arrays = {name: torch.tensor(array) for name, array in golden[0].items()}
    theirs = isc_features_to_metric(arrays["logits"], splits=6, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(arrays["logits"], 500) == pytest.approx(theirs, rel=1e-12)
    made, real = arrays["features_generated"][:900], arrays["features_reference"][:800]
    found = metrics.precision_recall(real, made, k=5)
    # Theirs compares float32 distances: a feature at a ball's edge may fall on the other side.
    assert found == pytest.approx(calculate_precision_recall_full(made, real, 5), abs=2 / 800)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    real=st.integers(4, 40),
    made=st.integers(4, 40),
    dim=st.integers(1, 6),
    k=st.integers(1, 3),
    blocks=st.sampled_from([(2048, 8192), (5, 7), (1, 1)]),
)
def test_blocks_equal_the_plain_definition(
    seed: int, real: int, made: int, dim: int, k: int, blocks: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    reference, generated = rng.normal(size=(real, dim)), rng.normal(size=(made, dim)) * 1.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_ROWS", blocks[0])
        patch.setattr(scores, "_COLUMNS", blocks[1])
        found = metrics.precision_recall(reference, generated, k, device="cpu")
    assert found == (_share(generated, reference, k), _share(reference, generated, k))


def _share(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(a[:, None] - b[None]).sum(axis=2))

    radii = np.sort(distances(centres, centres), axis=1)[:, k]
    return float((distances(points, centres) <= radii).any(axis=1).mean())


def test_same_features_cover_each_other_and_far_ones_do_not() -> None:
    features = np.random.default_rng(0).normal(size=(50, 5))
    assert metrics.precision_recall(features, features.copy()) == (1.0, 1.0)
    assert metrics.precision_recall(features, features + 1000) == (0.0, 0.0)
    # A generator that draws one image again and again is precise, and reaches that image alone.
    narrow = features[:1] + np.random.default_rng(1).normal(size=(50, 5)) * 1e-3
    assert metrics.precision_recall(features, narrow) == (1.0, 1 / 50)


def test_the_bounds_of_the_inception_score() -> None:
    assert metrics.inception_score(np.zeros((40, 7)), 10) == pytest.approx(1, abs=1e-12)
    sure = np.eye(8).repeat(5, axis=0) * 1e4  # float32's softmax would say 0 log 0
    assert metrics.inception_score(sure, 40) == pytest.approx(8, rel=1e-12)
    assert metrics.inception_score(sure, 5) == pytest.approx(1, rel=1e-12)  # sorted: a split holds one class


def test_a_short_last_split_counts_as_much_as_a_whole_one() -> None:
    logits = np.random.default_rng(0).normal(size=(25, 6)) * 2
    parts = [metrics.inception_score(logits[at : at + 10], 10) for at in (0, 10, 20)]
    assert metrics.inception_score(logits, 10) == pytest.approx(np.mean(parts), rel=1e-12)


def test_what_cannot_be_scored_is_refused() -> None:
    good = np.random.default_rng(0).normal(size=(10, 3))
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.inception_score(bad)
    with pytest.raises(ValueError, match="NaN"):
        metrics.precision_recall(good, bad)
    with pytest.raises(ValueError, match="expected \\(N, C\\)"):
        metrics.inception_score(good[0])
    with pytest.raises(ValueError, match="more than 3 features in each set, not 10 and 3"):
        metrics.precision_recall(good, good[:3])
    with pytest.raises(ValueError, match="expected \\(N, D\\) and \\(M, D\\)"):
        metrics.precision_recall(good, good[:, :2])
