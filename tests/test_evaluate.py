"""The door `evaluate`: one result from any kind of source, whoever dies; a checkpoint judged where it draws."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray import evaluate, measure, sample, weights
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.image_sets import ImageSet
from dico_ray.demo import FEATURES, JUDGE
from dico_ray.demo.digits import load_digits
from dico_ray.metrics import Reference, open_classifier, open_network
from dico_ray.models import DiCo
from dico_ray.recipes import resolve
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.weight_files import arguments
from tests.metrics.networks import random_inception

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 digits by class, as many others, and the checkpoint of a network with random weights."""
    root = tmp_path_factory.mktemp("evaluate")
    pixels, labels = load_digits()
    for name, first in (("real", 0), ("others", 20)):
        for label in range(10):
            (root / name / str(label)).mkdir(parents=True)
            for i, image in enumerate(pixels[labels == label][first : first + 20]):
                Image.fromarray(image).save(root / name / str(label) / f"{i:03d}.png")
    config = _config(root)
    torch.manual_seed(0)
    network = DiCo(**arguments(config.model))
    tensors = {name: torch.randn_like(tensor) * 0.1 for name, tensor in network.state_dict().items()}
    torch.save(tensors, root / "weights.pt")
    weights.run_import(config, file=str(root / "weights.pt"), step=7)
    return root


def _config(folder: Path, **sections: Any) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "run": {"storage": str(folder / "runs"), "name": "digits"},
        "model": {"hidden_size": 8, "depths": [1] * 5},
        "sample": {"count": 20, "steps": 2, "batch_size": 5, "guidance_scale": 1.0},
        "evaluate": {"reference": str(folder / "real"), "batch_size": 16, "range_size": 20},
        "resources": {"actors": 1},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return resolve("tiny-cpu", None, settings)


def _result(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    path = folder / f"{name}.json"
    evaluate.main(_config(folder, evaluate={"reference": str(folder / "real"), **settings, "output": str(path)}))
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def plain(folder: Path, local_ray: None) -> dict[str, Any]:
    """The others against the real ones, both as folders."""
    return _result(folder, "plain", images=str(folder / "others"))


def test_a_result_has_every_number_or_why_not(plain: dict[str, Any], folder: Path) -> None:
    assert plain["frechet_distance"] > 0
    assert (plain["images"], plain["reference_images"]) == (200, 200)
    assert 0 < plain["precision"] <= 1
    assert 0 < plain["recall"] <= 1
    for name in ("fid", "sfid", "inception_score"):
        assert plain[name] is None
        assert "digits features" in plain["missing"][name]
    assert plain["label"] == "Frechet distance on digits features, 200 images"
    assert not plain["comparable_with_published_fid"]
    assert plain["warnings"] == []
    assert plain["judge"]["images"] > 0.95
    assert plain["judge"]["reference"] > 0.95
    record = plain["provenance"]
    assert record["image_hash"] == ImageSet.scan(str(folder / "others"), "x").content_hash()
    assert record["features"] == open_network(str(FEATURES)).hash
    assert (record["split_size"], record["neighbours"], record["count"]) == (5000, 3, 200)
    assert set(record["versions"]) >= {"dico_ray", "torch", "numpy"}
    assert not (folder / "runs" / "digits" / measure.PARTS).exists() or not list(
        (folder / "runs" / "digits" / measure.PARTS).rglob("*.safetensors")
    )


def test_every_kind_of_source_and_reference_gives_the_same_numbers(plain: dict[str, Any], folder: Path) -> None:
    others, real = (ImageSet.scan(str(folder / name), "x") for name in ("others", "real"))
    np.savez(folder / "others.npz", others.read(0, 200), np.array(others.labels))
    np.savez(folder / "real.npz", real.read(0, 200))
    (cached,) = (folder / "runs" / evaluate.REFERENCES).glob("*.npz")  # by another key than a new reference's
    shutil.copy(cached, folder / "statistics.npz")
    cases = {
        "npz": {"images": str(folder / "others.npz")},
        "reference-npz": {"images": str(folder / "others"), "reference": str(folder / "real.npz")},
        "statistics": {"images": str(folder / "others"), "reference": str(folder / "statistics.npz")},
    }
    for name, settings in cases.items():
        found = _result(folder, name, **settings)
        for number in ("frechet_distance", "precision", "recall"):
            assert found[number] == pytest.approx(plain[number], rel=1e-6), (name, number)
        assert found["judge"]["images"] == plain["judge"]["images"]


def test_adms_statistics_alone_give_no_precision(folder: Path, plain: dict[str, Any]) -> None:
    """mu and sigma, as many published references have."""
    total = _total(_config(folder), {"images": str(folder / "real")})["images"]
    pool = Reference.of(total.statistics).pool
    assert pool is not None
    np.savez(folder / "mu.npz", mu=pool[0], sigma=pool[1])
    found = _result(folder, "mu", images=str(folder / "others"), reference=str(folder / "mu.npz"))
    assert found["frechet_distance"] == pytest.approx(plain["frechet_distance"], rel=1e-6)
    assert (found["precision"], found["reference_images"]) == (None, None)
    assert "neither images nor features" in found["missing"]["precision"]
    np.savez(folder / "mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ConfigError, match="its mu is of 3 features, those of digits features are 64"):
        _result(folder, "wrong", images=str(folder / "others"), reference=str(folder / "mu.npz"))


def test_a_checkpoint_is_judged_where_it_draws(folder: Path) -> None:
    config = _config(folder)
    checkpoint = Checkpoint.last(Storage(config.run.folder).at("checkpoints"))
    assert checkpoint is not None
    direct = evaluate.score_checkpoint(config, checkpoint)
    assert not list((folder / "runs" / "digits").glob("**/*.png"))
    assert direct["provenance"]["images"] is None
    samples = direct["provenance"]["samples"]
    assert (samples["step"], samples["steps"], samples["count"], samples["seed"]) == (7, 2, 20, 0)
    assert samples["ema"] == "decay not told: imported"
    assert any("20 images are too few for 64 features" in warning for warning in direct["warnings"])
    sample.main(config)
    evaluate.main(config)  # finds the run's samples
    by_files = json.loads((folder / "runs" / "digits" / "evaluation.json").read_text())
    assert by_files["provenance"]["images"].endswith("samples/images")
    assert by_files["provenance"]["samples"] == samples
    assert by_files["images"] == direct["images"] == 20
    assert by_files["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-6)
    assert by_files["judge"]["images"] == direct["judge"]["images"]


@pytest.mark.parametrize("format", ["webdataset", "npz"])
def test_samples_of_every_format_are_judged_as_they_lie(folder: Path, tmp_path: Path, format: str) -> None:
    """And drawn anew, where they are not all there any more."""
    config = _config(
        folder, sample={"format": format, "output": str(tmp_path / "made")},
        evaluate={"reference": str(folder / "real"), "output": str(tmp_path / "result.json")},
    )  # fmt: skip
    sample.main(config)
    evaluate.main(config)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["provenance"]["images"] == f"{tmp_path}/made/images{'.npz' if format == 'npz' else ''}"
    assert found["images"] == 20
    assert list(found["judge"]["by_class"]) == [str(label) for label in range(10)]
    next((tmp_path / "made").glob("images/*.tar" if format == "webdataset" else "images.npz")).unlink()
    evaluate.main(config)
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["provenance"]["images"] is None
    assert again["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-6)
    assert again["judge"] == found["judge"]


def _total(config: Config, urls: dict[str, str]) -> dict[str, measure.Total]:
    judges = measure.Judges(open_network(str(FEATURES)), open_classifier(str(JUDGE), "evaluate.judge"))
    sources: dict[str, measure.Source] = {which: ImageSet.scan(url, which) for which, url in urls.items()}
    parts = {which: Storage(config.run.folder).at("parts", which) for which in urls}
    return measure.measure(config, judges, sources, parts, dict.fromkeys(urls, 1))


def _own_actors(kind: bytes = b"EvaluateActor") -> list[int]:
    """Process ids of this test's Ray's actors: this process started its raylet, and that the actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("cmdline").read_bytes().startswith(b"ray::" + kind):
                raylet = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{raylet}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                    found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_killed_actors_and_a_restart_change_nothing(folder: Path, tmp_path: Path) -> None:
    urls = {"images": str(folder / "others"), "reference": str(folder / "real")}
    fine = {**{"reference": urls["reference"], "batch_size": 4}, "range_size": 4}
    whole = _total(_config(folder, run={"storage": str(tmp_path / "whole")}, evaluate=fine), urls)
    disturbed = _config(folder, run={"storage": str(tmp_path / "disturbed")}, evaluate=fine, resources={"actors": 2})
    done, killed = threading.Event(), []

    def killer() -> None:
        rng = random.Random(1)
        while not done.wait(rng.uniform(0.01, 0.1)) and len(killed) < 3:
            parts = list((tmp_path / "disturbed").rglob("*.safetensors"))
            actors = _own_actors()
            if actors and len(parts) > 10 * len(killed) + 1:  # each after parts were delivered
                killed.append(rng.choice(actors))
                os.kill(killed[-1], signal.SIGKILL)
                time.sleep(0.5)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        found = _total(disturbed, urls)
    finally:
        done.set()
        thread.join()
    assert len(killed) >= 1
    _assert_same(found, whole)
    parts = sorted((tmp_path / "disturbed").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in parts]
    parts[3].unlink()
    parts[5].write_bytes(parts[5].read_bytes()[:100])
    _assert_same(_total(disturbed, urls), whole)  # as a restarted evaluation: two ranges are done again
    again = [path.stat().st_mtime_ns for path in parts]
    assert [i for i, (one, other) in enumerate(zip(times, again, strict=True)) if one != other] == [3, 5]


def test_a_killed_reading_process_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """An actor of four CPUs has two; the pool makes a new actor, with new ones, and the old one's other ends too."""
    urls = {"images": str(folder / "others"), "reference": str(folder / "real")}
    fine = {"reference": urls["reference"], "batch_size": 4, "range_size": 4}
    whole = _total(_config(folder, run={"storage": str(tmp_path / "whole")}, evaluate=fine), urls)
    killed, done = list[int](), threading.Event()

    def killer() -> None:
        while not done.wait(0.02) and not killed:
            if len(list((tmp_path / "disturbed").rglob("*.safetensors"))) > 5:
                killed.extend(_own_actors(b"_Reader")[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=killer)
    thread.start()
    config = _config(
        folder, run={"storage": str(tmp_path / "disturbed")}, evaluate=fine,
        resources={"actors": 1, "actor_cpus": 4, "threads": 1},
    )  # fmt: skip
    try:
        found = _total(config, urls)
    finally:
        done.set()
        thread.join()
    assert len(killed) == 1
    _assert_same(found, whole)
    until = time.monotonic() + 20
    while _own_actors(b"_Reader") and time.monotonic() < until:
        time.sleep(0.1)
    assert _own_actors(b"_Reader") == []


def _assert_same(found: dict[str, measure.Total], whole: dict[str, measure.Total]) -> None:
    for which, total in whole.items():
        mine, wanted = found[which].statistics, total.statistics
        assert mine.count == wanted.count == 200
        assert mine.pool is not None
        assert wanted.pool is not None
        for one, other in zip(mine.pool.compute(), wanted.pool.compute(), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
        assert np.array_equal(found[which].right, total.right)
        assert found[which].seen.sum() == 200


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"evaluate.images: 1 image; a covariance needs at least 2"):
        _result(folder, "x", images=str(tmp_path), judge="")
    Image.new("RGB", (48, 48)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"48x48 pixels, the feature network takes 32x32; set evaluate.image_size 32"):
        _result(folder, "x", images=str(tmp_path), judge="")
    with pytest.raises(ConfigError, match=r"evaluate.precision: fp16 is a GPU's, and this runs on CPUs; take fp32"):
        _result(folder, "x", images=str(tmp_path), judge="", image_size=32, precision="fp16")
    found = _result(folder, "x", images=str(tmp_path), judge="", image_size=32)
    assert found["judge"] is None
    assert found["precision"] is None
    assert "2 images are too few for 3 neighbours" in found["missing"]["precision"]


def test_two_results_are_compared(plain: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {**plain, "frechet_distance": plain["frechet_distance"] + 1}
    other["provenance"] = {**plain["provenance"], "neighbours": 5, "samples": {"steps": 50}}
    (folder / "other.json").write_text(json.dumps(other))
    capsys.readouterr()
    evaluate.main(_config(folder), compare=[str(folder / "plain.json"), str(folder / "other.json")])
    told = capsys.readouterr().out
    assert "neighbours: 3 | 5" in told
    assert "samples.steps: not told | 50" in told
    assert "(+1)" in told
    assert "versions" not in told
    evaluate.main(_config(folder), compare=[str(folder / "plain.json"), str(folder / "plain.json")])
    assert "rest on the same choices" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no result of evaluate"):
        evaluate.main(_config(folder), compare=[str(folder / "plain.json"), _write(folder / "no.json", "[]")])
    with pytest.raises(ConfigError, match="is not there"):
        evaluate.main(_config(folder), compare=[str(folder / "plain.json"), str(folder / "none.json")])


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_inception_gives_every_number(folder: Path, tmp_path: Path) -> None:
    """All of ADM's metrics, of the pipeline with a network of random weights; the reference by its statistics too."""
    network = str(random_inception(tmp_path / "random.pth"))
    images = {"images": str(folder / "others"), "features": network, "judge": ""}
    found = _result(folder, "inception", **images)
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert found[name] is not None, name
    assert found["fid"] == found["frechet_distance"] > 0
    assert found["inception_score"] >= 1
    assert found["label"] == "FID-200"
    assert not found["comparable_with_published_fid"]
    assert len(found["warnings"]) == 3  # both sets too small, and sorted by label
    assert found["missing"] == {}
    cached = max((folder / "runs" / evaluate.REFERENCES).glob("*.npz"), key=lambda path: path.stat().st_size)
    again = _result(folder, "inception-statistics", **images, reference=_copy(cached, tmp_path / "adm.npz"))
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert again[name] == pytest.approx(found[name], rel=1e-9)


def _copy(source: Path, target: Path) -> str:
    shutil.copy(source, target)
    return str(target)
