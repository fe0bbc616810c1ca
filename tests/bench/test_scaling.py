from __future__ import annotations

import json
from pathlib import Path

import pytest

from dico_ray import cli
from dico_ray.bench import scaling
from tests.bench.test_network import TINY


def _row(workers: int, stage: int, rate: float) -> dict[str, object]:
    return {"workers": workers, "stage": stage, "micro_batch": 64, "model": "DiCo-S", "images_per_s": rate}


def test_efficiency_is_by_worker_against_the_fewest_of_the_same_stage() -> None:
    rows = [_row(2, 1, 50.0), _row(2, 3, 30.0), _row(8, 1, 45.0)]
    assert [scaling.efficiency(row, rows) for row in rows] == [1.0, 1.0, 0.9]
    failed = {"workers": 4, "stage": 1, "micro_batch": 64, "model": "DiCo-S", "failed": "out of memory"}
    assert scaling.efficiency(failed, [*rows, failed]) is None
    assert scaling.line({**failed, "efficiency": None}).endswith("out of memory")


@pytest.mark.parametrize(("option", "value"), [("--stages", "[4]"), ("--workers", "[0]"), ("--steps", "0")])
def test_what_cannot_be_measured_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "scaling", *TINY, option, value])
    assert stop.value.code == 2
    assert "stages are 0 to 3" in capsys.readouterr().err


@pytest.mark.ray
def test_workers_and_stages_have_a_row_each(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    own = ["--workers", "[2,1]", "--stages", "[1,3]", "--micro_batches", "[2]", "--steps", "1", "--json", str(file)]
    words = ["--train.global_batch", "8", "--resources.worker_cpus", "0.5", "--resources.threads", "1"]
    assert cli.main(["bench", "scaling", *TINY, *own, *words]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["workers"], row["stage"], row["accumulate"]) for row in rows] == [
        (1, 1, 4), (1, 3, 4), (2, 1, 2), (2, 3, 2),
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and row["foreseen_gb"] > 0 for row in rows)
    assert rows[2]["efficiency"] == pytest.approx(rows[2]["images_per_s"] / rows[0]["images_per_s"])
    assert "2x ZeRO-3" in capsys.readouterr().out
