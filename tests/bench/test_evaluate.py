from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dico_ray.bench import evaluate as bench
from dico_ray.config import Config, ConfigError
from dico_ray.demo import FEATURES
from dico_ray.settings import build


def _bench(config: Config, **arguments: Any) -> dict[str, Any]:
    """The figures, with other arguments than these."""
    given: dict[str, Any] = {
        "images": 8, "size": 32, "random": False, "rival": False, "ways": ["all"], "actors": [0], "folder": "",
        "json": "", **arguments,
    }  # fmt: skip
    bench.main(config, verbose=False, **given)
    return json.loads(Path(given["json"]).read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_bench_times_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build({"evaluate": {"batch_size": 4, "range_size": 8}, "resources": {"accelerator": "cpu"}})
    figures = _bench(config, images=16, random=True, rival=True, json=str(tmp_path / "figures.json"))
    for name in ("images_per_s", "read_images_per_s", "network_images_per_s", "statistics_images_per_s",
                 "torch_fidelity_images_per_s", "eager_images_per_s"):  # fmt: skip
        assert figures[name] > 0
    assert list(figures["ways"]) == ["fp32"]  # the others are GPUs'
    assert figures["ways"]["fp32"]["images_per_s"] > 0
    assert figures["ways"]["fp32"]["difference_rms"] == 0
    assert (figures["images"], figures["device"], figures["batch_size"]) == (16, "cpu", 4)
    assert "torch-fidelity's pass" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_pools_of_several_sizes_judge_all_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build({
        "evaluate": {"features": str(FEATURES), "batch_size": 2, "range_size": 2}, "resources": {"accelerator": "cpu"}
    })  # fmt: skip
    folder = tmp_path / "made"
    with pytest.raises(ConfigError, match="a pool of 99 actors needs 99 CPUs"):  # before anything is written or timed
        _bench(config, images=1000, actors=[99], folder=str(folder))
    assert not folder.exists()
    figures = _bench(
        config, images=20, ways=["none"], actors=[2, 1], folder=str(folder), json=str(tmp_path / "figures.json")
    )
    assert list(figures["pool_images_per_s"]) == ["1", "2"]
    assert min(figures["pool_images_per_s"].values()) > 0
    assert figures["ways"] == {}
    assert len(list((folder / "20-images-of-32").glob("*.png"))) == 20
    assert len(list((folder / "parts").iterdir())) == 10
    assert "pool of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rival": True}, "--rival false"),
        ({"random": True, "rival": True, "folder": "s3://bucket/x"}, "torch-fidelity reads local files"),
        ({"images": 3}, "--images 3 .*take 8 or more"),
        ({"actors": [2, -1]}, "0 or more actors"),
        ({"ways": ["fp8"]}, "--ways fp8: take all, none, or some of fp32, tf32"),
        ({"ways": ["fp32", "none"]}, "--ways none: take all, none, or some"),
        ({"ways": ["fp16 compiled"]}, "--ways fp16 compiled: it is a GPU's way"),
        ({"images": 1000, "actors": [2]}, "4 ranges .* keep no pool of 2 busy"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: dict[str, Any], message: str) -> None:
    config = build({"evaluate": {"features": str(FEATURES)}, "resources": {"accelerator": "cpu"}})
    with pytest.raises(ConfigError, match=message):
        _bench(config, **arguments)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_another_network_is_timed_alone(tmp_path: Path) -> None:
    config = build({"evaluate": {"features": str(FEATURES)}, "resources": {"accelerator": "cpu"}})
    figures = _bench(config, images=40, json=str(tmp_path / "figures.json"))
    assert min(figures[name] for name in ("images_per_s", "read_images_per_s", "network_images_per_s")) > 0
    assert figures["pool_images_per_s"] == {}
