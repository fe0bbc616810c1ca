"""The door `train` for real: Ray Train, Ray Data and DeepSpeed, on shards of a few latents."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dico_ray import average, train
from dico_ray.config import Config, ConfigError
from dico_ray.data.shards import Manifest
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.telemetry import read_events, read_metrics

pytestmark = pytest.mark.ray


def _config(latents: Path, storage: Path, name: str, **settings: Any) -> Config:
    return build({
        "run": {"storage": str(storage), "name": name},
        "model": {"hidden_size": 8, "depths": [1] * 5, "num_classes": 10, "latent_size": 8},
        "data": {"latents": str(latents), "window_samples": 64, "read_tasks": 1},
        "train": {
            "global_batch": 16, "steps": 8, "lr": 1e-3, "precision": "fp32", "ema_decay": 0.9, "log_every": 1,
            "zero_stage": 2, "checkpoint_every": 100, **settings,
        },
        "resources": {"worker_cpus": 0.5, "threads": 1},
    })  # fmt: skip


def _losses(config: Config) -> np.ndarray:
    metrics = read_metrics(Storage(config.run.folder))
    assert [m["step"] for m in metrics] == list(range(1, config.train.steps + 1))
    return np.array([m["loss"] for m in metrics])


def _ema(config: Config) -> np.ndarray:
    last = Checkpoint.last(Storage(config.run.folder).at(train.CHECKPOINTS))
    assert last is not None
    assert last.step == config.train.steps
    return np.concatenate([t.flatten().numpy() for t in last.tensors("ema").values()])


@pytest.mark.parametrize(("decay", "steps"), [(0.9999, 400), (0.999, 858), (0.9, 8)])
def test_a_run_that_ends_before_its_averages_forget_is_told_a_decay_that_fits(
    decay: float, steps: int, latents: Path, tmp_path: Path
) -> None:
    config = _config(latents, tmp_path, "short", steps=steps, ema_decay=decay)
    told = train.short_for_average(config.train)
    assert f"{100 * decay**steps:.0f}% the initial ones by train.ema_decay {decay:g}" in told
    better = float(told.split("; ")[1].split()[0])
    assert better**steps == pytest.approx(0.01, rel=0.3)
    fits = _config(latents, tmp_path, "short", steps=steps, ema_decay=better)
    assert train.short_for_average(fits.train) == ""


@pytest.fixture(scope="module")
def straight(latents: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """One worker, eight steps, without a break: what every other way has to equal."""
    config = _config(latents, tmp_path_factory.mktemp("straight"), "one", num_workers=1)
    train.main(config)
    return config


def test_two_workers_and_accumulation_give_the_same_curve_and_average(
    straight: Config, latents: Path, tmp_path: Path
) -> None:
    config = _config(latents, tmp_path, "two", num_workers=2, micro_batch=4, zero_stage=1)
    train.main(config)
    np.testing.assert_allclose(_losses(config), _losses(straight), rtol=1e-5)
    (told,) = [event for event in read_events(Storage(config.run.folder)) if event["event"] == "kernels"]
    assert told["text"] == "plain PyTorch (the network is on cpu, not on a GPU)"
    # AdamW's first steps divide by gradients near zero: rounding shows in single weights, not in the whole.
    difference = np.linalg.norm(_ema(config) - _ema(straight)) / np.linalg.norm(_ema(straight))
    assert difference < 1e-4


def test_averages_of_other_widths_come_from_the_snapshots_of_two_workers(
    straight: Config, latents: Path, tmp_path: Path
) -> None:
    """Snapshots on two workers, then on one after a resume; a profile that is added then is refused at once."""
    profiles = {"ema_profiles": (0.1, 0.2), "ema_snapshot_every": 2}
    train.main(_config(latents, tmp_path, "kept", num_workers=2, steps=5, **profiles))
    more = {**profiles, "ema_profiles": (0.1, 0.15, 0.2)}
    with pytest.raises(ConfigError, match=r"train\.ema_profiles: .* has no average ema-0\.150"):
        train.main(_config(latents, tmp_path, "kept", **more))
    resumed = _config(latents, tmp_path, "kept", zero_stage=3, **profiles)
    train.main(resumed)
    run = Storage(resumed.run.folder)
    assert [c.step for c in Checkpoint.all(run.at("averages"))] == [2, 4, 5, 6, 8]
    assert np.linalg.norm(_ema(resumed) - _ema(straight)) < 1e-4 * np.linalg.norm(_ema(straight))
    average.main(resumed, sigma=0.1)
    made = Checkpoint.last(run.at("ema-0.100"))
    kept = Checkpoint.last(run.at(train.CHECKPOINTS))
    assert made is not None
    assert kept is not None
    for name, tensor in kept.tensors("ema-0.100").items():
        np.testing.assert_allclose(made.tensors("ema")[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_same_command_resumes_on_another_world_size_and_stage(
    straight: Config, latents: Path, tmp_path: Path
) -> None:
    train.main(_config(latents, tmp_path, "broken", num_workers=2, steps=3))
    resumed = _config(latents, tmp_path, "broken", num_workers=1, zero_stage=3)
    train.main(resumed)
    np.testing.assert_allclose(_losses(resumed), _losses(straight), rtol=1e-5)
    assert np.linalg.norm(_ema(resumed) - _ema(straight)) < 1e-4 * np.linalg.norm(_ema(straight))


def test_a_killed_worker_costs_no_committed_step(straight: Config, latents: Path, tmp_path: Path) -> None:
    config = _config(latents, tmp_path, "killed", num_workers=2, checkpoint_every=2)
    killed: list[int] = []

    def kill() -> None:
        checkpoints = Storage(config.run.folder).at(train.CHECKPOINTS)
        while Checkpoint.last(checkpoints) is None:
            time.sleep(0.02)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline())]
        os.kill(workers[0].pid, signal.SIGKILL)
        killed.append(workers[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    train.main(config)
    thread.join()
    assert killed
    np.testing.assert_allclose(_losses(config), _losses(straight), rtol=1e-5)


def test_a_finished_run_is_not_done_again(straight: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = Storage(straight.run.folder).read("metrics.jsonl")
    train.main(straight)
    assert "nothing to do" in capsys.readouterr().out
    assert Storage(straight.run.folder).read("metrics.jsonl") == before


def test_learning_rates_by_width_cannot_begin_within_a_run(straight: Config) -> None:
    mup = {"parametrization": "mup", "base_width": 4}
    changed = build({**straight.model_dump(), "train": {**straight.train.model_dump(), **mup}})
    with pytest.raises(ConfigError, match=r"train\.parametrization: 'mup', but the run one was begun with 'standard'"):
        train.main(changed)


def test_settings_that_define_the_draws_cannot_change_within_a_run(straight: Config) -> None:
    changed = build({**straight.model_dump(), "run": {**straight.run.model_dump(), "seed": 5}})
    with pytest.raises(ConfigError, match=r"run\.seed: 5, but the run one was begun with 0"):
        train.main(changed)


def test_the_run_folder_holds_what_the_readme_says(straight: Config) -> None:
    folder = Path(straight.run.folder)
    assert build(json.loads(json.dumps(straight.model_dump(mode="json")))) == straight
    assert (folder / "config.yaml").read_text() == straight.to_yaml()
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.rglob("*.pkl"))
    assert not list(folder.rglob("*.pt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"latent_size": 16}}, "model.latent_size"),
        ({"model": {"latent_size": 8, "in_channels": 8}}, "model.in_channels"),
        ({"model": {"latent_size": 8, "num_classes": 3}}, "model.num_classes"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(latents: Path, settings: Any, message: str) -> None:
    config = build({"data": {"latents": str(latents)}, **settings})
    with pytest.raises(ConfigError, match=message):
        train.check_fits(config, Manifest.load(Storage(str(latents))))


def test_too_few_cpus_are_told_before_anything_starts(latents: Path, tmp_path: Path, local_ray: None) -> None:
    config = _config(latents, tmp_path, "large", num_workers=16)
    with pytest.raises(ConfigError, match=r"needs 8\.5 CPUs and the Ray cluster has 4"):
        train.main(config)


def test_a_corrupt_shard_ends_the_run_with_its_name(latents: Path, tmp_path: Path, local_ray: None) -> None:
    import shutil

    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    shard = copy / "shard-00002.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    config = _config(copy, tmp_path, "corrupt", num_workers=1, max_failures=0)
    with pytest.raises(train.TrainingFailedError, match=r"shard-00002\.tar at byte 0: hash"):
        train.main(config)


@pytest.mark.slow
def test_two_one_and_three_workers_at_other_stages_follow_one_straight_run(
    latents: Path, tmp_path: Path, local_ray: None
) -> None:
    straight = _config(latents, tmp_path, "straight", global_batch=12)
    train.main(straight)
    for steps, workers, stage in ((3, 2, 1), (6, 1, 3), (8, 3, 2)):
        config = _config(
            latents, tmp_path, "parts", global_batch=12, steps=steps, num_workers=workers, zero_stage=stage
        )
        train.main(config)
    np.testing.assert_allclose(_losses(config), _losses(straight), rtol=1e-5)
    assert np.linalg.norm(_ema(config) - _ema(straight)) < 1e-4 * np.linalg.norm(_ema(straight))


@pytest.mark.slow
def test_a_run_that_diverges_goes_back_and_then_says_so(latents: Path, tmp_path: Path, local_ray: None) -> None:
    """A learning rate that cannot work: the offending steps are left out, and in the end the run is given up."""
    config = _config(latents, tmp_path, "wild", lr=1e30, steps=40, max_skipped_steps=2, max_failures=1)
    with pytest.raises(train.TrainingFailedError, match=r"gradients of steps \d+ to \d+ were not finite.*train\.lr"):
        train.main(config)
    events = read_events(Storage(config.run.folder))
    (passed,) = [e for e in events if e["event"] == "passed over"]
    assert len(passed["steps"]) == 2
    assert [e["event"] for e in events].count("start") == 2
