"""Tracking services as they are without a server: MLflow's file store, W&B's offline mode."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dico_ray.config import ConfigError
from dico_ray.training.track import PROJECT, open_tracker

CONFIG = {"recipe": "tiny-cpu", "train": {"lr": 0.5}}


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.joinpath("ml").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_mlflow_has_the_numbers_and_a_resumed_run_goes_on(stores: Path) -> None:
    import mlflow

    for steps in ((10, 20), (20, 30)):
        tracker = open_tracker("mlflow", "s3://b/run", "run", CONFIG)
        for step in steps:
            tracker.log({"step": step, "loss": 1 / step})
        tracker.close()
    other = open_tracker("mlflow", "s3://b/other", "run", CONFIG)
    other.close()
    client = mlflow.MlflowClient(stores.joinpath("ml").as_uri())
    experiment = client.get_experiment_by_name(PROJECT)
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    run = next(r for r in runs if r.data.metrics)
    assert run.data.params["train.lr"] == "0.5"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(10, 0.1), (20, 0.05), (20, 0.05), (30, 1 / 30)]


def test_wandb_records(stores: Path) -> None:
    tracker = open_tracker("wandb", "s3://b/run", "run", CONFIG)
    tracker.log({"step": 10, "loss": 0.125})
    tracker.close()
    (record,) = stores.rglob("run-*.wandb")
    until = time.monotonic() + 120  # the service's own process writes it, after it said that it is done
    while b"0.125" not in record.read_bytes():
        assert time.monotonic() < until, record.read_bytes()
        time.sleep(0.2)


def test_a_service_that_turns_the_run_away(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ConfigError, match=r"run\.track: mlflow: .*nonsense"):
        open_tracker("mlflow", "s3://b/run", "run", CONFIG)
