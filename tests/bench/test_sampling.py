from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dico_ray.bench import sampling
from dico_ray.config import Config, ConfigError
from dico_ray.recipes import resolve
from dico_ray.storage import Storage
from dico_ray.weights import find_checkpoint, load_network


def config(folder: Path, **sample: object) -> Config:
    return resolve("tiny-cpu", None, {
        "run": {"storage": str(folder), "name": "none"},
        "model": {"hidden_size": 8, "depths": [1] * 5},
        "sample": {"steps": 4, "batch_size": 4, "method": "ddim", **sample},
    })  # fmt: skip


def test_impossible_benches_are_refused(tmp_path: Path) -> None:
    for wrong, said in (
        ({"weights": "mine"}, "weights must be random or run"),
        ({"vae": "mine"}, "vae random or codec"),
        ({"images": 0}, "numbers 1 or more"),
        ({"actors": ()}, "numbers 1 or more"),
        ({"actors": (2, 0)}, "numbers 1 or more"),
        ({"timed_steps": 5}, "must be 0 to sample.steps, 4"),
    ):
        arguments: dict[str, Any] = {"images": 4, "weights": "random", "vae": "random", "actors": (1,)}
        arguments |= {"timed_steps": 0, "evaluate": False, **wrong}
        with pytest.raises(ConfigError, match=said):
            sampling.main(config(tmp_path), verbose=False, folder=str(tmp_path), json="", **arguments)
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        sampling.main(
            config(tmp_path),
            verbose=False,
            images=4,
            timed_steps=0,
            evaluate=False,
            weights="run",
            vae="random",
            actors=(1,),
            folder=str(tmp_path),
            json="",
        )


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_bench_compares_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "_VAE_WIDTHS", (32, 32, 32, 32))
    file = tmp_path / "figures.json"
    sampling.main(
        config(tmp_path, method="ddpm"), verbose=False, images=6, timed_steps=2, evaluate=True, weights="random",
        vae="random", actors=(1, 2), folder=str(tmp_path / "made"), json=str(file),
    )  # fmt: skip
    figures = json.loads(file.read_text())
    ours, released = figures["ours"]["images_per_s"], figures["released"]["images_per_s"]
    assert figures["ratio_released"] == pytest.approx(ours / released)
    assert figures["network_rows_per_image"] == 8  # four steps, guided
    assert figures["ours"]["share_of_network_rate"] == pytest.approx(8 * ours / figures["network_rows_per_s"])
    judged = figures["judged"]
    assert judged["share_of_network_rate"] == pytest.approx(8 * judged["images_per_s"] / figures["network_rows_per_s"])
    assert figures["fid_50k_device_hours"] == pytest.approx(50_000 / judged["images_per_s"] / 3600)
    assert all(judged["seconds_per_image"][phase] > 0 for phase in ("features", "statistics"))
    assert set(figures["pool_images_per_s"]) == {"1", "2"}
    for name in ("ours", "released"):
        assert set(figures[name]["seconds_per_image"]) == {"network", "decode", "host"}
        assert all(value > 0 for value in figures[name]["seconds_per_image"].values())
    made = Storage(str(tmp_path / "made"))
    assert len(made.at("images", "images").names(".png")) >= 12  # two actors, six images each, all stored
    assert len(made.at("images", "released").names(".png")) == 6
    assert "times the released way's" in capsys.readouterr().out
    run = resolve("tiny-cpu", None, {"run": {"storage": str(tmp_path / "made"), "name": "random"}})
    assert load_network(find_checkpoint(run), run).num_classes == 10
