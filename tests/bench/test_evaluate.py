from __future__ import annotations

import json
from pathlib import Path

import pytest

from dico_ray.bench import evaluate as bench
from dico_ray.config import ConfigError
from dico_ray.demo import FEATURES
from dico_ray.settings import build


@pytest.mark.slow
def test_the_bench_times_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build({"evaluate": {"batch_size": 4, "range_size": 8}, "resources": {"accelerator": "cpu"}})
    file = tmp_path / "figures.json"
    bench.main(config, verbose=False, images=16, size=32, random=True, rival=True, json=str(file))
    figures = json.loads(file.read_text())
    for name in ("images_per_s", "read_images_per_s", "network_images_per_s", "statistics_images_per_s",
                 "torch_fidelity_images_per_s", "eager_images_per_s"):  # fmt: skip
        assert figures[name] > 0
    assert list(figures["ways"]) == ["fp32"]  # the others are GPUs'
    assert figures["ways"]["fp32"]["images_per_s"] > 0
    assert figures["ways"]["fp32"]["difference_rms"] == 0
    assert (figures["images"], figures["device"], figures["batch_size"]) == (16, "cpu", 4)
    assert "torch-fidelity's pass" in capsys.readouterr().out


def test_another_network_has_no_rival(tmp_path: Path) -> None:
    config = build({"evaluate": {"features": str(FEATURES)}, "resources": {"accelerator": "cpu"}})
    with pytest.raises(ConfigError, match="--rival false"):
        bench.main(config, verbose=False, images=8, size=32, random=False, rival=True, json="")
    with pytest.raises(ConfigError, match="--images 3: take 8 or more"):
        bench.main(config, verbose=False, images=3, size=32, random=True, rival=False, json="")
    file = tmp_path / "figures.json"
    bench.main(config, verbose=False, images=40, size=32, random=False, rival=False, json=str(file))
    assert "torch_fidelity_images_per_s" not in json.loads(file.read_text())
