"""Evaluations beside a real training: numbers come with their steps; whatever befalls them, training goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from dico_ray import train
from dico_ray.config import Config, ConfigError
from dico_ray.demo.digits import load_digits
from dico_ray.evaluator import _runs
from dico_ray.recipes import resolve
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import find
from dico_ray.training.evaluations import FOLDER, Evaluations, results
from dico_ray.training.telemetry import read_evaluated, read_events, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 real digits by class."""
    root = tmp_path_factory.mktemp("digits")
    pixels, labels = load_digits()
    for label in range(10):
        (root / str(label)).mkdir()
        for i, image in enumerate(pixels[labels == label][:12]):
            Image.fromarray(image).save(root / str(label) / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def unnamed(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents, of an autoencoder that is not known: the recipe's may decode."""
    folder = tmp_path_factory.mktemp("unnamed") / "latents"
    shutil.copytree(latents, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["codec"]["hash"] = ""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _config(latents: Path, digits: Path, storage: Path, name: str, **sections: Any) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "run": {"storage": str(storage), "name": name},
        "model": {"hidden_size": 8, "depths": [1] * 5},
        "data": {"latents": str(latents), "window_samples": 64, "validation": str(latents), "validation_samples": 16},
        "train": {
            "global_batch": 8, "steps": 12, "warmup_steps": 1, "num_workers": 1, "log_every": 4, "checkpoint_every": 4,
            "keep_checkpoints": 1,
        },
        "sample": {"steps": 2, "batch_size": 10},
        "evaluate": {"every": 4, "count": 20, "grid_rows": 2, "reference": str(digits), "judge": ""},
    }  # fmt: skip
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return resolve("tiny-cpu", None, settings)


def _events(config: Config, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(Storage(config.run.folder)) if e["event"] == kind]


def test_what_is_not_there_is_told_before_training(unnamed: Path, digits: Path, tmp_path: Path) -> None:
    for sections, told in (
        ({"evaluate": {"reference": "/no/such/folder"}}, "evaluate.reference: /no/such/folder"),
        ({"codec": {"vae": "/no/such/vae"}}, "codec.vae: /no/such/vae"),
    ):
        config = _config(unnamed, digits, tmp_path, "refused", **sections)
        with pytest.raises(ConfigError, match=told):
            train.main(config)
        assert not Storage(config.run.folder).names()


def test_the_grid_is_drawn_in_runs_without_gaps() -> None:
    assert _runs([0, 1, 2, 5, 6, 9], 2) == [(0, 2), (2, 3), (5, 7), (9, 10)]
    assert _runs([3], 8) == [(3, 4)]


@pytest.mark.slow
def test_numbers_come_with_their_steps_while_training_goes_on(unnamed: Path, digits: Path, tmp_path: Path) -> None:
    steps = {"steps": 3000, "checkpoint_every": 250, "log_every": 50, "validate_every": 500,
             "keep_best": 1, "best_metric": "frechet_distance"}  # fmt: skip
    config = _config(unnamed, digits, tmp_path, "beside", train=steps, evaluate={"every": 500})
    run = Storage(config.run.folder)
    thread = threading.Thread(target=train.main, args=(config,))
    thread.start()
    while thread.is_alive() and not _events(config, "evaluation"):
        time.sleep(0.2)
    reached = read_metrics(run)[-1]["step"]
    thread.join()
    metrics, evaluated, found = read_metrics(run), read_evaluated(run), results(run.at(FOLDER))
    assert 500 <= reached < 3000  # the first one was there before training ended
    assert [m["step"] for m in metrics] == list(range(50, 3001, 50))
    assert all("step_s" in m for m in metrics)
    assert [m["step"] for m in metrics if "val_loss" in m] == list(range(500, 3001, 500))
    steps_done = [f["step"] for f in found]
    assert steps_done[-1] == 3000
    assert [m["step"] for m in evaluated] == steps_done
    for line, one in zip(evaluated, found, strict=True):
        assert line["frechet_distance"] == one["result"]["frechet_distance"] > 0
        assert line["evaluation_images"] == 20
        picture = Image.open(run.path(f"{FOLDER}/step-{one['step']:08d}.png"))
        assert picture.size == (10 * 34 - 2, 2 * 34 - 2)
    best = min(found, key=lambda f: f["scores"]["frechet_distance"])
    kept = [f.name for f in find(run.at("checkpoints"))]
    assert kept == sorted({best["checkpoint"], found[-1]["checkpoint"]})
    assert set(run.at(FOLDER).names()) == {f"step-{s:08d}.{kind}" for s in steps_done for kind in ("json", "png")}
    skipped = [e["checkpoint"] for e in _events(config, "evaluation skipped")]
    assert len(skipped) + len(found) == 6
    assert not _events(config, "evaluation failed")

    # A command that ended while it waited for the last one leaves its marker: the same command does it.
    due = Evaluations.of(config)
    assert due
    due.committed(found[-1]["checkpoint"], 3000)
    before = len(_events(config, "evaluation"))
    train.main(config)
    assert len(_events(config, "evaluation")) == before + 1
    assert not due.due()
    assert [m["step"] for m in read_metrics(run)] == [m["step"] for m in metrics]


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        ({"judge": "/no/such/file.safetensors"}, "/no/such/file.safetensors"),
        ({"actors": 100, "start_timeout_s": 1}, "no room for 100 actors"),
        pytest.param({"timeout_s": 0.5}, "took more than 0.5 s (evaluate.timeout_s)", marks=pytest.mark.slow),
        pytest.param({"wait_s": 0}, "not done within 0 s of the end (evaluate.wait_s)", marks=pytest.mark.slow),
    ],
)
def test_whatever_befalls_an_evaluation_is_told_and_training_ends_well(
    unnamed: Path, digits: Path, tmp_path: Path, evaluate: dict[str, Any], told: str
) -> None:
    config = _config(unnamed, digits, tmp_path, "unlucky", evaluate=evaluate)
    train.main(config)
    run = Storage(config.run.folder)
    assert [m["step"] for m in read_metrics(run)] == [4, 8, 12]
    assert read_evaluated(run) == []
    assert told in _events(config, "evaluation failed")[-1]["text"]
    assert [f.step for f in find(run.at("checkpoints"))] == [12]
    assert run.at(FOLDER).names() == []


@pytest.mark.slow
def test_without_a_reference_a_grid_is_kept(unnamed: Path, digits: Path, tmp_path: Path) -> None:
    config = _config(unnamed, digits, tmp_path, "pictures", evaluate={"reference": ""})
    train.main(config)
    run = Storage(config.run.folder)
    assert results(run.at(FOLDER))[-1]["step"] == 12
    assert run.at(FOLDER).exists("step-00000012.png")
    assert read_evaluated(run) == []


@pytest.mark.slow
def test_workers_that_start_again_get_its_room_and_it_is_done_later(
    unnamed: Path, digits: Path, tmp_path: Path
) -> None:
    """A worker is killed while an evaluation is under way: that one ends at once, stays due, and comes after all."""
    steps = {"steps": 1000, "checkpoint_every": 250, "log_every": 50}
    config = _config(unnamed, digits, tmp_path, "killed", train=steps, evaluate={"every": 250})
    run = Storage(config.run.folder)
    thread = threading.Thread(target=train.main, args=(config,))
    thread.start()
    while thread.is_alive() and not any("_Judge" in name for name in _processes()):
        time.sleep(0.05)
    judged = _processes()
    (worker,) = [pid for name, pid in judged.items() if "RayTrainWorker" in name]
    os.kill(worker, signal.SIGKILL)
    thread.join()
    assert [e["event"] for e in read_events(run)].count("start") == 2
    assert not _events(config, "evaluation failed")
    assert [m["step"] for m in read_metrics(run)] == list(range(50, 1001, 50))
    assert results(run.at(FOLDER))[-1]["step"] == 1000
    assert [m["step"] for m in read_evaluated(run)] == [f["step"] for f in results(run.at(FOLDER))]


def _processes() -> dict[str, int]:
    """Ray's workers by the title that says what runs in them."""
    found = psutil.Process().children(recursive=True)
    return {" ".join(p.cmdline()): p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE}
