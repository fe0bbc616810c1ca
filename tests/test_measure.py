"""An actor that judges: the same features by one thread or two, in any precision near fp32's, compiled once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray.bench.evaluate import untrained
from dico_ray.config import UserError
from dico_ray.data.image_sets import ImageSet
from dico_ray.demo import FEATURES, JUDGE
from dico_ray.demo.digits import load_digits
from dico_ray.encode import ShardEncoder, ShardPlan
from dico_ray.measure import EvaluateActor, Judges, Made, Part, few_threads, range_size, stored_parts
from dico_ray.metrics import Inception, open_classifier, open_network
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """46 digits in the folders of two classes."""
    root = tmp_path_factory.mktemp("measure")
    pixels, labels = load_digits()
    for label in (0, 1):
        (root / str(label)).mkdir()
        for i, image in enumerate(pixels[labels == label][:23]):
            Image.fromarray(image).save(root / str(label) / f"{i:02d}.png")
    return ImageSet.scan(str(root), "evaluate.images")


def _actor(network: Any, source: ImageSet, folder: Path, gpu: bool = False, **settings: Any) -> EvaluateActor:
    config = build({"evaluate": {"batch_size": 5, **settings}, "resources": {"threads": 1}})
    judges = Judges(network, open_classifier(str(JUDGE), "evaluate.judge"))
    return EvaluateActor(config, judges, {"images": source}, {"images": Storage(str(folder))}, gpu)


def test_two_threads_find_what_one_does(digits: ImageSet, tmp_path: Path) -> None:
    work = [("images", start, min(start + 12, 46)) for start in range(0, 46, 12)]
    alone = _actor(open_network(str(FEATURES)), digits, tmp_path / "alone")
    wanted = [alone.work(piece) for piece in work]
    both = _actor(open_network(str(FEATURES)), digits, tmp_path / "both")
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(both.work, work))
    stored = stored_parts(Storage(str(tmp_path / "both")))
    assert list(stored) == [(start, stop) for _, start, stop in work]
    for one, other, kept in zip(wanted, found, stored.values(), strict=True):
        for part in (other, kept):
            assert torch.equal(part.features.pool, one.features.pool)
            assert torch.equal(part.labels, one.labels)
            assert part.read is not None
            assert one.read is not None
            assert torch.equal(part.read, one.read)
    assert np.concatenate([part.labels for part in found]).tolist() == list(digits.labels)


@pytest.mark.parametrize(("batch", "size"), [(32, 256), (96, 192), (256, 256), (300, 300), (1, 256)])
def test_images_are_made_in_whole_batches(digits: ImageSet, batch: int, size: int) -> None:
    config = build({"sample": {"batch_size": batch}, "evaluate": {"range_size": 256}})
    made = Made(config, Checkpoint(Storage("/nowhere"), {}))
    assert range_size(config, made) == size
    assert range_size(config, digits) == 256


@pytest.mark.parametrize(("threads", "few"), [(1, 1), (3, 3), (8, 4), (32, 8)])
def test_sums_leave_processors_to_those_that_decode(threads: int, few: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with suppress(UserError), few_threads():
            found = torch.get_num_threads()
            raise UserError("as an evaluation may end")
        assert (found, torch.get_num_threads()) == (few, threads)
    finally:
        torch.set_num_threads(before)


def test_latents_that_are_not_finite_end_an_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ShardEncoder.__new__(ShardEncoder)
    monkeypatch.setattr(encoder, "_config", build({"codec": {"precision": "fp16"}}), raising=False)
    plan = ShardPlan("shard-00003.tar", 0, ())
    assert encoder._gather(plan, [torch.zeros(2, 3), torch.ones(1, 3)]).tolist() == [[0] * 3, [0] * 3, [1] * 3]
    for precision, says in (("fp16", r"codec\.precision: fp16, but latents of shard-00003"), ("fp32", r"codec\.vae: ")):
        monkeypatch.setattr(encoder, "_config", build({"codec": {"precision": precision}}), raising=False)
        with pytest.raises(UserError, match=says):
            encoder._gather(plan, [torch.zeros(2, 3), torch.tensor([[1.0, np.inf, 1.0]])])


@pytest.mark.gpu
@torch.inference_mode()
def test_every_precision_is_near_fp32_and_compiled_once(digits: ImageSet, tmp_path: Path) -> None:
    """Ranges of 5, 5 and 2 images; rms of a feature's error, in its standard deviations."""
    weights, pixels = untrained(), torch.from_numpy(digits.read(0, 12)).permute(0, 3, 1, 2)
    exact = Inception(weights)(pixels)
    graphs = torch._dynamo.utils.counters["stats"]
    for precision, compiled, limit in (
        ("fp32", False, 1e-3), ("tf32", False, 1e-2), ("fp16", False, 1e-2), ("tf32", True, 1e-2), ("fp16", True, 1e-2)
    ):  # fmt: skip
        torch.compiler.reset()
        before = graphs["unique_graphs"]
        actor = _actor(Inception(weights), digits, tmp_path, True, precision=precision, compile=compiled)
        part: Part = actor.work(("images", 0, 12))
        for name in ("pool", "spatial", "logits"):
            found, wanted = getattr(part.features, name), getattr(exact, name)
            assert found.dtype == torch.float32
            assert float((found - wanted).square().mean().sqrt() / wanted.std()) < limit, (precision, name)
        assert graphs["unique_graphs"] == before + compiled
