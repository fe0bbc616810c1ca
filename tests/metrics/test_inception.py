"""The Inception wrapper beside torch-fidelity's own network and pipeline, on the same random weights."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray import metrics
from dico_ray.config import ConfigError
from dico_ray.data.image_sets import ImageSet
from dico_ray.demo.digits import load_digits
from dico_ray.metrics import Inception, inception
from tests.metrics.networks import random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of torch hub's."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def _layers(network: Any, pixels: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.clone()}))
        for name, module in network.named_children()
    ]
    with torch.inference_mode():
        result = network(pixels)
    for hook in hooks:
        hook.remove()
    return result, seen


@torch.inference_mode()
def test_every_layer_equals_torch_fidelitys(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names: Any = ["2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=str(weights))
    ours = metrics.open_network(str(weights))
    assert isinstance(ours, Inception)
    digits, _ = load_digits()
    pixels = torch.from_numpy(digits[:3]).permute(0, 3, 1, 2)
    (pool, unbiased, biased), wanted = _layers(theirs, pixels)
    _, found = _layers(ours.network, pixels)
    assert list(found) == list(wanted)
    assert len(found) > 15
    for name, output in wanted.items():
        assert torch.equal(found[name], output), name
    features = ours(pixels)
    assert torch.equal(features.pool, pool)
    assert features.logits is not None
    assert torch.equal(features.logits, unbiased)
    assert not torch.allclose(features.logits, biased)
    assert features.spatial is not None
    assert features.spatial.shape == (3, 2023)
    mixed = wanted["Mixed_6d"].numpy()  # (3, 768, 17, 17)
    assert np.array_equal(features.spatial.numpy(), mixed.transpose(0, 2, 3, 1)[..., :7].reshape(3, -1))


def test_a_copy_by_pickle_is_the_same_network(weights: Path) -> None:
    """As Ray sends it to the pool's actors."""
    ours = metrics.open_network(str(weights))
    copy = pickle.loads(pickle.dumps(ours))  # noqa: S301
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(copy(pixels).spatial, ours(pixels).spatial)
    assert (copy.name, copy.hash) == ("Inception-v3 with the weights of random.pth", ours.hash)


def test_a_missing_network_says_where_to_put_the_file(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none.pth is no file; put weights-inception\S+ there"):
        metrics.open_network(str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match=rf"cannot be fetched .*: put weights-.* at {hub}/w.pth"):
        metrics.open_network("http://127.0.0.1:9/w.pth")
    assert list(hub.iterdir()) == []


def test_weights_by_url_are_fetched_once(weights: Path, hub: Path) -> None:
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(weights.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/random.pth"
        first = inception.find_weights(url)
        server.shutdown()
    assert first == hub / "random.pth"
    assert first.read_bytes() == weights.read_bytes()
    assert inception.find_weights(url) == first  # the server is gone
    assert not inception.published(first)


def test_the_cache_is_where_inception_is_looked_for(weights: Path, hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / inception.FILE).write_bytes(weights.read_bytes())
    assert inception.find_weights("inception") == hub / inception.FILE


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/dico-ray-never-made",)


def test_files_that_are_no_weights_are_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="damaged, or no file of tensors alone"):
        metrics.open_network(str(path))
    torch.save({"a": _Evil()}, path)
    with pytest.raises(ConfigError, match="damaged, or no file of tensors alone"):
        metrics.open_network(str(path))
    assert not Path("/tmp/dico-ray-never-made").exists()
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="not those of torch-fidelity's Inception"):
        metrics.open_network(str(path))


def _write(images: np.ndarray, folder: Path) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return str(folder)


@torch.inference_mode()
def _statistics(network: Any, folder: str, device: str) -> metrics.Statistics:
    images, found = ImageSet.scan(folder, "evaluate.images"), metrics.Statistics()
    for start in range(0, images.count, 50):
        pixels = torch.from_numpy(images.read(start, min(start + 50, images.count))).permute(0, 3, 1, 2)
        found.add(start, network(pixels.to(device)).cpu())
    return found


@pytest.mark.parametrize(
    ("count", "device"),
    [pytest.param(200, "cpu", marks=pytest.mark.slow), pytest.param(2500, "cuda", marks=pytest.mark.gpu)],
)
def test_the_whole_way_equals_torch_fidelitys_metrics(weights: Path, tmp_path: Path, count: int, device: str) -> None:
    """FID, inception score, precision and recall of two sets of digits, files to numbers."""
    import torch_fidelity

    torch.backends.cudnn.allow_tf32 = False
    digits, _ = load_digits()
    order = np.random.default_rng(0).permutation(len(digits))
    one = _write(digits[order[:count]], tmp_path / "one")
    two = _write(digits[order[-count:]] // 10 * 9, tmp_path / "two")
    theirs = torch_fidelity.calculate_metrics(
        feature_extractor="inception-v3-compat", input1=one, input2=two, fid=True, isc=True, prc=True,
        cuda=device == "cuda", cache=False, verbose=False,
        feature_extractor_weights_path=str(weights), isc_splits=5, samples_shuffle=False, prc_neighborhood=3,
    )  # fmt: skip
    network: Any = metrics.open_network(str(weights))
    network.to(device)
    made, real = _statistics(network, one, device), _statistics(network, two, device)
    assert made.pool is not None
    assert real.pool is not None
    distance = metrics.frechet_distance(*made.pool.compute(), *real.pool.compute())
    logits = made.logits()
    assert logits is not None
    score = metrics.inception_score(logits, count // 5)
    precision, recall = metrics.precision_recall(real.features(), made.features(), 3)
    print(theirs, distance, score, precision, recall)
    # Its root of a product that is not symmetric is the less exact one, where images are fewer than features.
    assert distance == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert min(precision, recall, distance, score - 1) > 0.001
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=2 / count)
