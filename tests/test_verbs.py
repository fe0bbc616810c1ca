"""encode -> train -> sample -> evaluate -> report on real digits, small: the doors fit each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import ray.data
import torch
import webdataset
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image
from pyarrow import parquet
from webdataset import WebDataset

from dico_ray import demo, encode, evaluate, sample, train
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data import convert
from dico_ray.data.images import ImageError
from dico_ray.data.latents import Autoencoder
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.demo.digits import load_digits
from dico_ray.operate import report
from dico_ray.recipes import resolve
from dico_ray.storage import Storage
from dico_ray.training.telemetry import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits by class."""
    root = tmp_path_factory.mktemp("verbs")
    pixels, labels = load_digits()
    for label in range(10):
        (root / "digits" / str(label)).mkdir(parents=True)
        for i, image in enumerate(pixels[labels == label][:12]):
            Image.fromarray(image).save(root / "digits" / str(label) / f"{i:03d}.png")
    return root


def _config(folder: Path, **sections: Any) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "run": {"storage": str(folder / "runs"), "name": "digits"},
        "model": {"hidden_size": 8, "depths": [1] * 5},
        "data": {"latents": str(folder / "latents"), "window_samples": 64},
        "encode": {"images": str(folder / "digits"), "shard_samples": 50, "batch_size": 16, "chunk_bytes": 40_000},
        "train": {"global_batch": 16, "steps": 4, "warmup_steps": 1, "num_workers": 1, "log_every": 1},
        "sample": {"count": 24, "steps": 3, "batch_size": 5, "grid_rows": 2},
        "evaluate": {"reference": str(folder / "digits"), "batch_size": 16},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return resolve("tiny-cpu", None, settings)


@pytest.fixture(scope="module")
def encoded(folder: Path, local_ray: None) -> Manifest:
    config = _config(folder)
    encode.main(config)
    return Manifest.load(Storage(config.data.latents))


@pytest.fixture(scope="module")
def trained(folder: Path, encoded: Manifest) -> Config:
    config = _config(folder)
    train.main(config)
    return config


def _latents(folder: str) -> np.ndarray:
    storage = Storage(folder)
    manifest = Manifest.load(storage)
    return np.concatenate([read_chunks(storage, manifest, [i]).latents for i in range(len(manifest.chunks))])


def test_encode_writes_what_the_manifest_says(encoded: Manifest, folder: Path) -> None:
    assert (encoded.count, [s.count for s in encoded.shards]) == (120, [50, 50, 20])
    assert (encoded.channels, encoded.latent_size, encoded.classes) == (4, (8, 8), tuple("0123456789"))
    latents = _latents(str(folder / "latents")).astype(np.float64)
    np.testing.assert_allclose(encoded.statistics["mean"], latents.mean((0, 1, 3, 4)), atol=1e-6)
    np.testing.assert_allclose(encoded.statistics["std"], latents.std((0, 1, 3, 4)), rtol=1e-6)
    assert not list((folder / "latents").rglob("*.tmp"))


def test_the_same_images_give_the_same_shards_on_any_pool_and_batch(encoded: Manifest, folder: Path) -> None:
    other = _config(folder, data={"latents": str(folder / "again")}, encode={"batch_size": 50}, resources={"actors": 1})
    encode.main(other)
    # Another batch size rounds differently in fp32, which float16 shows only now and then, in its last place.
    difference = np.abs(_latents(str(folder / "again")).astype(np.float64) - _latents(str(folder / "latents")))
    assert difference.max() < 0.01
    assert (difference > 0).mean() < 0.05
    same = _config(folder, data={"latents": str(folder / "same")}, resources={"actors": 1})
    encode.main(same)
    hashes = [s.hashes for s in Manifest.load(Storage(same.data.latents)).shards]
    assert hashes == [s.hashes for s in encoded.shards]


def test_a_broken_autoencoder_ends_an_encoding_with_its_reason(encoded: Manifest, folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(str(demo.VAE), low_cpu_mem_usage=False)
    torch.nn.init.constant_(vae.encoder.conv_in.bias, float("nan"))
    vae.save_pretrained(folder / "broken-vae")
    config = _config(folder, data={"latents": str(folder / "never")}, codec={"vae": str(folder / "broken-vae")})
    with pytest.raises(UserError, match=r"codec\.vae: latents of shard-0000\d\.tar are not finite"):
        encode.main(config)
    assert not (folder / "never" / "manifest.json").exists()


def test_mirrored_latents_decode_to_the_mirrored_image(encoded: Manifest, folder: Path) -> None:
    config = _config(folder)
    vae = Autoencoder(config.codec.vae, "fp32", torch.device("cpu"))
    latents = torch.from_numpy(_latents(str(folder / "latents"))[:20]).float()
    plain, mirrored = (vae.decode(latents[:, flip]).int() for flip in (0, 1))
    assert (plain.flip(2) - mirrored).abs().float().mean() < 5  # grey levels
    assert (plain - mirrored).abs().float().mean() > 10  # digits are not symmetric
    turned = vae.decode(latents[:, 0].flip(3)).int()
    assert (turned - mirrored).abs().float().mean() > 10  # a turned latent is not the mirrored image's


def test_encode_does_finished_shards_not_again(folder: Path, encoded: Manifest) -> None:
    config = _config(folder, data={"latents": str(folder / "restarted")})
    encode.main(config)
    root = folder / "restarted"
    complete = {p.name: p.read_bytes() for p in root.glob("*.tar")}
    images = encode.ImageSource.scan(Storage(config.encode.images), "encode.images")
    plans = encode.plan_shards(config, images)
    # As a killed encode leaves it: two shards with their records, no manifest.
    encoder = encode.ShardEncoder(config, ray.put(images), encode._fingerprint(config, images), gpu=False)
    (root / "manifest.json").unlink()
    for plan in plans[:2]:
        encoder({"plan": [plan]})
    (root / plans[2].name).unlink()
    old = (root / plans[0].name).stat().st_mtime_ns
    encode.main(config)
    assert (root / plans[0].name).stat().st_mtime_ns == old
    assert {p.name: p.read_bytes() for p in root.glob("*.tar")} == complete
    assert Manifest.load(Storage(str(root))).count == 120


def test_images_that_cannot_be_read_are_left_out_and_named(folder: Path, encoded: Manifest) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "digits", broken)
    (broken / "3" / "004.png").write_bytes(b"no image")
    whole = (broken / "5" / "001.png").read_bytes()
    (broken / "5" / "001.png").write_bytes(whole[: len(whole) // 2])
    config = _config(folder, encode={"images": str(broken)}, data={"latents": str(folder / "broken-latents")})
    encode.main(config)
    manifest = Manifest.load(Storage(config.data.latents))
    assert manifest.count == 118
    assert sorted(reason.split(":")[0] for reason in manifest.skipped) == ["3/004.png", "5/001.png"]


def test_latents_of_other_settings_are_not_written_over(folder: Path, encoded: Manifest) -> None:
    with pytest.raises(ConfigError, match="encoded from other images or settings"):
        encode.main(_config(folder, encode={"store": "mean"}))


def test_moments_are_stored_and_trained_on(folder: Path, encoded: Manifest) -> None:
    """Each time that a sample is seen, its latents are drawn anew; a run with them repeats all the same."""
    target = folder / "moments"
    own = {"latents": str(target)}
    encode.main(_config(folder, data=own, encode={"store": "moments"}))
    manifest = Manifest.load(Storage(str(target)))
    assert (manifest.content, manifest.channels, manifest.latent_channels) == ("moments", 8, 4)
    moments = _latents(str(target)).astype(np.float32)
    drawn = _latents(str(folder / "latents")).astype(np.float32)
    deviations = (drawn - moments[:, :, :4]) / np.exp(moments[:, :, 4:] / 2)
    assert abs(float(deviations.mean())) < 0.05
    assert abs(float(deviations.std()) - 1) < 0.05
    losses = []
    for name in ("once", "again"):
        train.main(_config(folder, data=own, run={"name": f"moments-{name}"}))
        losses.append([m["loss"] for m in read_metrics(Storage(str(folder / "runs" / f"moments-{name}")))])
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match="means and log variances"):
        convert.main(
            _config(folder), verbose=False, source=str(target), target=str(folder / "x"), kind="plain", scale=1.0
        )


def test_stock_readers_read_the_shards(folder: Path, encoded: Manifest) -> None:
    shards = [str(folder / "latents" / s.name) for s in encoded.shards]
    mine = _latents(str(folder / "latents"))
    stock = list(WebDataset(shards, shardshuffle=False).decode())
    assert len(stock) == 120
    for ours, theirs in zip(mine, stock, strict=True):
        assert np.array_equal(ours, theirs["latent.npy"])
        assert theirs["cls"] in range(10)
    rows = ray.data.read_webdataset(shards, decoder=True).take_all()
    assert len(rows) == 120
    by_key = {row["__key__"]: row for row in rows}
    for theirs in stock:
        row = by_key[theirs["__key__"]]
        assert np.array_equal(np.asarray(row["latent.npy"]), theirs["latent.npy"])
        assert int(row["cls"]) == theirs["cls"]


def _images(folder: str) -> dict[str, np.ndarray]:
    root = Path(folder) / "images"
    return {str(p.relative_to(root)): np.asarray(Image.open(p)).astype(int) for p in sorted(root.rglob("*.png"))}


def test_an_image_is_the_same_on_any_pool_and_batch_size(trained: Config, folder: Path) -> None:
    first = _config(folder, sample={"output": str(folder / "a")}, resources={"actors": 1})
    second = _config(folder, sample={"output": str(folder / "b"), "batch_size": 24}, resources={"actors": 2})
    sample.main(first)
    sample.main(second)
    a, b = _images(first.sample.output), _images(second.sample.output)
    assert list(a) == list(b)
    assert list(a)[:3] == ["0/000000.png", "0/000010.png", "0/000020.png"]
    # Truncation to uint8 can turn a rounding difference into one grey level.
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= 1
    assert len({image.tobytes() for image in a.values()}) == 24
    picture = Image.open(folder / "a" / "grid.png")
    assert picture.size == (10 * 34 - 2, 2 * 34 - 2)


def test_the_whole_way_to_the_report(trained: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(trained)
    evaluate.main(trained)
    report.main(trained)
    run = Path(trained.run.folder)
    result = json.loads((run / "evaluation.json").read_text())
    assert result["frechet_distance"] > 0
    assert (result["images"], result["reference_images"]) == (24, 120)
    assert result["judge"]["reference"] > 0.95
    assert 0 <= result["judge"]["images"] <= 0.6  # four steps of training draw no digits
    assert result["provenance"]["samples"]["step"] == 4
    assert result["provenance"]["samples"]["ema"] == f"decay {trained.train.ema_decay}"
    page = (run / "report.html").read_text()
    assert "not comparable with published FIDs" in page.replace("\n", " ")
    capsys.readouterr()
    sample.main(trained)
    evaluate.main(trained)
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_real_images_are_near_themselves(trained: Config, folder: Path) -> None:
    config = _config(
        folder, evaluate={"images": str(folder / "digits"), "output": str(folder / "self.json"), "batch_size": 7}
    )
    evaluate.main(config)
    result = json.loads((folder / "self.json").read_text())
    assert abs(result["frechet_distance"]) < 1e-6


def test_another_autoencoder_is_refused(trained: Config, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    other = folder / "other-vae"
    shutil.copytree(trained.codec.vae, other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 0.5
    save_file(weights, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = _config(folder, codec={"vae": str(other)}, sample={"output": str(folder / "c")})
    with pytest.raises(Exception, match="is not the autoencoder of the training latents"):
        sample.main(config)


def test_missing_things_are_named_before_anything_starts(folder: Path) -> None:
    cases = [
        (encode, {"encode": {"images": ""}}, r"encode\.images is unset"),
        (encode, {"encode": {"images": str(folder / "nowhere")}}, "holds no images"),
        (train, {"data": {"latents": str(folder / "nowhere")}}, "has no manifest.json"),
        (sample, {"run": {"name": "nobody"}}, "has no committed checkpoint"),
        (sample, {"sample": {"checkpoint": str(folder)}}, "no committed checkpoint"),
        (evaluate, {"evaluate": {"reference": ""}}, r"evaluate\.reference is unset"),
        (evaluate, {"evaluate": {"images": str(folder / "digits"), "features": str(folder / "x")}}, "no classifier"),
        (report, {"run": {"name": "nobody"}}, "has no metrics"),
    ]
    for door, sections, message in cases:
        with pytest.raises(ConfigError, match=message):
            door.main(_config(folder, **sections))


def test_archives_and_tables_encode_as_the_folder_does(folder: Path, encoded: Manifest) -> None:
    """The latents' mean (no posterior draw, which is keyed by name) of the same images from three kinds of source."""
    images = encode.ImageSource.scan(Storage(str(folder / "digits")), "encode.images")
    rows = [
        (data, label)
        for piece in images.pieces
        for (_, data), label in zip(images.read(Storage(str(folder / "digits")), piece), piece.labels, strict=True)
    ]
    tars, tables = folder / "tars", folder / "tables"
    tars.mkdir()
    tables.mkdir()
    with webdataset.TarWriter(str(tars / "0.tar")) as writer:
        for i, (data, label) in enumerate(rows):
            writer.write({"__key__": f"{i:05d}", "png": data, "cls": label})
    columns = {"image": [data for data, _ in rows], "label": [label for _, label in rows]}
    parquet.write_table(pyarrow.table(columns), tables / "0.parquet", row_group_size=7)
    found = {}
    for kind in ("digits", "tars", "tables"):
        target = folder / f"mean-{kind}"
        own = {"images": str(folder / kind), "store": "mean"}
        encode.main(_config(folder, data={"latents": str(target)}, encode=own))
        storage = Storage(str(target))
        manifest = Manifest.load(storage)
        samples = read_chunks(storage, manifest, range(len(manifest.chunks)))
        found[kind] = samples.latents.reshape(len(samples.labels), -1).astype(np.float32), samples.labels
    wanted, labels = found["digits"]
    for kind in ("tars", "tables"):  # each shuffled its own way: every image finds its like
        distance = np.abs(found[kind][0][:, None] - wanted[None]).max(axis=2)
        nearest = distance.argmin(axis=1)
        assert distance.min(axis=1).max() < 0.01
        assert sorted(nearest.tolist()) == list(range(len(labels)))
        assert found[kind][1].tolist() == labels[nearest].tolist()


def test_a_limit_of_unreadable_images(folder: Path, encoded: Manifest) -> None:
    broken = folder / "limited"
    shutil.copytree(folder / "digits", broken)
    for path in sorted(broken.rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    target = folder / "limited-latents"
    config = _config(folder, data={"latents": str(target)}, encode={"images": str(broken), "max_skipped": 2})
    with pytest.raises(ImageError, match=r"3 images cannot be read, more than encode\.max_skipped = 2"):
        encode.main(config)
    assert not (target / "manifest.json").exists()
    encode.main(_config(folder, data={"latents": str(target)}, encode={"images": str(broken), "max_skipped": 3}))
    assert len(Manifest.load(Storage(str(target))).skipped) == 3
