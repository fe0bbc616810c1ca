from __future__ import annotations

import json
from pathlib import Path

import pytest

from dico_ray.bench import encoding, sampling
from dico_ray.config import ConfigError
from dico_ray.recipes import resolve
from dico_ray.storage import Storage


def test_rows_are_compared_with_the_released_way() -> None:
    config = resolve("tiny-cpu", None, {"encode": {"batch_size": 8}})
    figures = encoding.measure(config, config.codec.vae, 16, gpu=False)
    rows = figures["rows"]
    assert list(rows) == ["released", "fp32", "bf16", "fp16"]
    assert rows["released"]["ratio"] == 1
    assert rows["fp32"]["difference_max"] < 1e-5
    assert 0 < rows["bf16"]["difference_rms"] < 0.02
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(row["ratio"] * rows["released"]["images_per_s"])


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_verb_makes_its_own_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "_VAE_WIDTHS", (32, 32, 32, 32))
    config = resolve("tiny-cpu", None, {"encode": {"batch_size": 2}})
    file = tmp_path / "figures.json"
    encoding.main(
        config, verbose=False, images=4, ways=["bf16"], vae="random", folder=str(tmp_path / "made"), json=str(file)
    )
    assert list(json.loads(file.read_text())["rows"]) == ["released", "bf16"]
    assert Storage(str(tmp_path / "made")).exists("vae/config.json")
    assert "latents move" in capsys.readouterr().out


def test_impossible_benches_are_refused() -> None:
    config = resolve("tiny-cpu", None, {})
    with pytest.raises(ConfigError, match="vae must be random or codec"):
        encoding.main(config, verbose=False, images=4, ways=["all"], vae="mine", folder="", json="")
    with pytest.raises(ConfigError, match="--ways int8: take all, or some of fp32, bf16, fp16, fp32 compiled"):
        encoding.main(config, verbose=False, images=4, ways=["int8"], vae="random", folder="", json="")
