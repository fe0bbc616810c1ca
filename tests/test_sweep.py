"""The door `sweep` for real: Ray Tune around the door `train`, on shards of a few latents."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dico_ray import cli, sweep
from dico_ray.config import Config, ConfigError
from dico_ray.planning.memory import room
from dico_ray.recipes import resolve
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.telemetry import read_events, read_metrics

PATIENCE_S = 400


def _config(latents: Path, storage: Path, train: dict[str, Any] | None = None, **settings: Any) -> Config:
    return build({
        "run": {"storage": str(storage), "name": "s"},
        "model": {"hidden_size": 8, "depths": [1] * 5, "num_classes": 10, "latent_size": 8},
        "data": {"latents": str(latents), "window_samples": 64, "read_tasks": 1},
        "train": {"global_batch": 16, "steps": 6, "precision": "fp32", "ema_decay": 0.9, "log_every": 1,
                  "zero_stage": 2, "checkpoint_every": 100, "num_workers": 1, **(train or {})},
        "resources": {"worker_cpus": 0.5, "threads": 1},
        "sweep": {"scales": ["x1"], "lr": [1e-3, 8e-3], "points": 3, "widen": 0, "verify": False, **settings},
    })  # fmt: skip


def _trials(config: Config) -> dict[str, Path]:
    return {path.name: path for path in (Path(config.run.folder) / "trials").glob("*")}


def _starts(trial: Path) -> list[int]:
    """The steps at which a trial's workers began."""
    return [event["step"] for event in read_events(Storage(str(trial))) if event["event"] == "start"]


def _groups_held() -> list[Any]:
    from ray.util import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def swept(latents: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """Four trials with two workers of one CPU each, on four CPUs: trials that each held a CPU would never begin."""
    config = _config(latents, tmp_path_factory.mktemp("swept"), {"num_workers": 2}, points=4)
    config = build({**config.model_dump(), "resources": {"worker_cpus": 1.0, "threads": 1}})
    sweep.main(config)
    return config


@pytest.mark.ray
def test_trials_that_could_wait_for_each_other_finish_and_free_what_they_held(swept: Config) -> None:
    assert len(_trials(swept)) == 4
    for path in _trials(swept).values():
        assert json.loads((path / "trial.json").read_text())["steps"] == 6
        last = Checkpoint.last(Storage(str(path)).at("checkpoints"))
        assert last is not None
        assert last.step == 6
        assert _starts(path) == [0]
    until = time.monotonic() + 60
    while _groups_held() and time.monotonic() < until:
        time.sleep(0.2)
    assert _groups_held() == []


@pytest.mark.ray
def test_what_comes_out(swept: Config, latents: Path) -> None:
    folder = Path(swept.run.folder)
    told = json.loads((folder / "sweep.json").read_text())
    (scale,) = told["scales"]
    assert [t["lr"] for t in scale["trials"]] == [1e-3, 2e-3, 4e-3, 8e-3]
    for trial in scale["trials"]:
        metrics = read_metrics(Storage(str(folder / "trials" / trial["trial"])))
        assert trial["value"] == pytest.approx(metrics[-1]["loss"])  # the last tenth of six steps is one
    best = resolve(None, str(folder / "best.yaml"), {})
    assert best.train.lr == pytest.approx(told["winner"]["lr"], rel=1e-3)
    assert (best.run.name, best.train.steps, best.data.latents) == ("s-best", 6, str(latents))
    assert "sweep" not in yaml.safe_load((folder / "best.yaml").read_text())
    page = (folder / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("*.pkl"))


@pytest.mark.ray
def test_the_same_command_trains_nothing_again(swept: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = (Path(swept.run.folder) / "sweep.json").read_text()
    sweep.main(swept)
    assert "at a time" not in capsys.readouterr().out
    assert (Path(swept.run.folder) / "sweep.json").read_text() == before


@pytest.mark.ray
def test_a_scale_that_the_cluster_cannot_hold_is_told(latents: Path, tmp_path: Path, local_ray: None) -> None:
    config = _config(latents, tmp_path, {"num_workers": 16}, scales=["w16"])
    with pytest.raises(ConfigError, match=r"w16 cannot fit: 16 workers and a reading task take 8\.5 CPUs .* has 4"):
        sweep.main(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep.metric", "fid"], "sweep.metric: nothing reports 'fid'; take loss or mse or vb"),
        (["--sweep.metric", "val_loss"], "val_loss needs train.validate_every"),
        (["--sweep.scales", "[]"], "sweep.scales: [] is empty"),
        (["--sweep.space", "{train.lrr: [1]}"], "sweep.space: train.lrr is not a setting"),
        (["--sweep.space", "{train.weight_decay: []}"], "is empty"),
        (["--sweep.worker_memory_gb", "0.001"], "sweep.scales: x1 cannot fit"),
        (["--data.latents", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(
    words: list[str], message: str, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    ran = ray.is_initialized()
    base = ["sweep", "--recipe", "tiny-cpu", "--train.flip", "true", "--data.latents", str(latents)]
    with pytest.raises(SystemExit) as stop:
        cli.main([*base, "--run.storage", str(tmp_path), *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert ray.is_initialized() == ran
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4),
    st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0]), st.booleans(),
)  # fmt: skip
def test_as_many_trials_as_have_all_their_parts_in_place(
    nodes: list[tuple[int, int]], workers: int, cpus: float, gpu: bool
) -> None:
    have = [{"CPU": float(c), "GPU": float(g)} for c, g in nodes]
    need = [{"CPU": cpus, "GPU": float(gpu)}] * workers + [{"CPU": 0.5, "GPU": 0.0}]
    count = sweep.at_once(need, have)
    assert count * (workers * cpus + 0.5) <= sum(n["CPU"] for n in have)
    assert not gpu or count * workers <= sum(n["GPU"] for n in have)
    if len(have) == 1 and not gpu:  # on one node nothing is lost to how parts are placed
        assert count == int(have[0]["CPU"] / (workers * cpus + 0.5))


def test_trials_of_small_models_share_gpus() -> None:
    shared = build({"train": {"num_workers": 1}, "resources": {"worker_gpus": 0.25, "worker_cpus": 1}})
    nodes = [{"CPU": 32.0, "GPU": 2.0}]
    assert sweep.at_once(sweep.bundles(shared, gpu=True), nodes) == 8
    for share, fit in ((0.4, 4), (0.6, 2), (0.15, 12), (0.5, 4)):  # a share is one card's: two cards hold four of 0.4
        some = build({"train": {"num_workers": 1}, "resources": {"worker_gpus": share}})
        assert sweep.at_once(sweep.bundles(some, gpu=True), nodes) == fit
    whole = build({"train": {"num_workers": 1}})
    assert sweep.at_once(sweep.bundles(whole, gpu=True), nodes) == 2
    assert room(shared) == room(whole) / 4


@pytest.mark.ray
@pytest.mark.slow
def test_stages_continue_from_checkpoints_scales_widen_and_the_winner_is_trained(
    latents: Path, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(
        latents, tmp_path, {"num_workers": (1, 2)}, points=4, rungs=2, lr=[1e-4, 4e-4], widen=1,
        verify=True, worker_parameters=10_000.0, predict=["w32"],
    )  # fmt: skip
    sweep.main(config)
    told = json.loads((Path(config.run.folder) / "sweep.json").read_text())
    (scale,) = told["scales"]
    assert scale["workers"] == 2
    planned = [t for t in scale["trials"] if t["lr"] <= 4e-4]
    assert sorted(t["steps"] for t in planned) == [3, 6, 6, 6]
    for trial in planned:
        assert _starts(_trials(config)[trial["trial"]]) == ([0] if trial["steps"] == 3 else [0, 3])
    assert len(scale["trials"]) == 5
    assert "loss" in (told["verified"] or {"loss": 0})  # nothing to verify where the best lies at an end
    out = capsys.readouterr().out
    assert "3 of 4 trials go on from step 3" in out
    assert "is the largest tried; trying" in out  # such rates are far too small
    assert told["predict"][0]["scale"] == "w32"


@pytest.mark.ray
@pytest.mark.chaos
def test_a_trial_whose_process_dies_continues_at_its_checkpoint(latents: Path, tmp_path: Path, local_ray: None) -> None:
    config = _config(latents, tmp_path, {"steps": 400, "checkpoint_every": 20, "log_every": 20})
    killed: list[int] = []

    def kill() -> None:
        """One that trains, as soon as all three trials, which run at the same time, have a checkpoint."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            begun = [Checkpoint.last(Storage(str(path)).at("checkpoints")) for path in _trials(config).values()]
            if len(begun) == 3 and all(begun):
                family = psutil.Process().children(recursive=True)
                (training, *_) = [p for p in family if "_Training.run" in "".join(p.cmdline())]
                os.kill(training.pid, signal.SIGKILL)
                killed.append(training.pid)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    sweep.main(config)
    thread.join()
    assert killed
    assert len(_trials(config)) == 3
    starts = [start for path in _trials(config).values() for start in _starts(path)]
    assert starts.count(0) == 3
    assert any(start > 0 for start in starts)


_COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dico_ray.cli import main
sys.exit(main(["sweep", "--config", sys.argv[1]]))
"""


@pytest.mark.ray
@pytest.mark.chaos
def test_a_command_that_was_interrupted_and_killed_continues(latents: Path, tmp_path: Path) -> None:
    config = _config(latents, tmp_path, {"steps": 200, "checkpoint_every": 20, "log_every": 20}, points=4)
    file = tmp_path / "sweep.yaml"
    file.write_text(config.to_yaml())
    command = [sys.executable, "-c", _COMMAND, str(file)]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        ended = {name for name, path in _trials(config).items() if _done(path)}
        began = {name: _starts(path) for name, path in _trials(config).items()}
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until = time.monotonic() + PATIENCE_S
        while all(_starts(path) == began.get(name, []) for name, path in _trials(config).items()):
            assert time.monotonic() < until
            assert running.poll() is None, running.communicate()
            time.sleep(0.1)
        running.send_signal(number)
        out, _ = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == code, out
        assert all(_starts(_trials(config)[name]) == began[name] for name in ended)
    assert sum(_done(path) for path in _trials(config).values()) < 4
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(_trials(config)) == 4
    assert all(_done(path) for path in _trials(config).values())


def _done(trial: Path) -> bool:
    record = trial / "trial.json"
    return record.exists() and json.loads(record.read_text())["steps"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_optuna_learns_from_the_trials_that_there_are(latents: Path, tmp_path: Path, local_ray: None) -> None:
    pytest.importorskip("optuna")
    space = {"train.weight_decay": {"low": 1e-3, "high": 0.1, "log": True}}
    sweep.main(_config(latents, tmp_path, points=3, search="optuna", space=space))
    first = set(_trials(_config(latents, tmp_path)))
    assert len(first) == 3
    sweep.main(_config(latents, tmp_path, points=4, search="optuna", space=space))
    assert first < set(_trials(_config(latents, tmp_path)))
    assert len(_trials(_config(latents, tmp_path))) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_a_rate_that_diverges_is_a_result(latents: Path, tmp_path: Path, local_ray: None) -> None:
    config = _config(latents, tmp_path, {"steps": 40, "max_skipped_steps": 2, "max_failures": 0}, lr=[1e-3, 1e33])
    sweep.main(config)
    (scale,) = json.loads((Path(config.run.folder) / "sweep.json").read_text())["scales"]
    assert [t["value"] is None for t in scale["trials"]][-1]
    assert scale["trials"][0]["value"] is not None
