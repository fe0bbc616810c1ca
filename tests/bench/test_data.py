from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dico_ray.bench import data as bench
from dico_ray.config import ConfigError
from dico_ray.data.order import SampleOrder
from dico_ray.settings import build
from dico_ray.storage import Storage


def test_mixing_tells_a_perfect_shuffle_from_none() -> None:
    labels = np.arange(4000) // 40  # 100 classes, sorted
    whole = bench.mixing(SampleOrder((40,) * 100, 100, 4000, 0), labels)  # the window is the epoch
    assert whole["chunk_spread"] == pytest.approx(1, abs=0.1)
    assert whole["label_entropy"] == pytest.approx(1, abs=0.02)
    small = bench.mixing(SampleOrder((40,) * 100, 100, 100, 0), labels)  # a window is one batch
    assert small["chunk_spread"] < 0.1
    assert small["label_entropy"] < 0.5


def test_synthetic_shards_are_made_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    manifest = bench.synthetic(storage, 100, 4, 8, 10)
    stamp = (tmp_path / manifest.shards[0].name).stat().st_mtime_ns
    assert bench.synthetic(storage, 100, 4, 8, 10) == manifest
    assert (tmp_path / manifest.shards[0].name).stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="holds other shards"):
        bench.synthetic(storage, 101, 4, 8, 10)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_bench_compares_all_readers_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_LEAST_SECONDS", 0.1)
    monkeypatch.setattr(bench, "_STREAM_SAMPLES", 4096)
    config = build({"model": {"latent_size": 8}, "data": {"window_samples": 512}})
    file = tmp_path / "figures.json"
    bench.main(config, verbose=False, samples=2048, folder=str(tmp_path / "shards"), rivals=True, json=str(file))
    figures = json.loads(file.read_text())
    rates = figures["rows_per_s"]
    assert set(rates) == {"stream", "plain_read", "webdataset_loader", "read_webdataset"}
    for name in ("plain_read", "webdataset_loader", "read_webdataset"):
        assert figures[f"ratio_{name}"] == pytest.approx(rates["stream"] / rates[name])
    assert figures["samples"] == 2048
    assert figures["peak_memory_mb"] > 0
    assert "the stream is" in capsys.readouterr().out
