from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dico_ray.cli import main as cli
from dico_ray.config import ConfigError
from dico_ray.operate.plan import main, make
from dico_ray.planning.memory import state_memory
from dico_ray.recipes import resolve


def test_main_tells_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {"train": {"num_workers": 64, "micro_batch": 4, "zero_stage": 2}}
    main(resolve("dico-h-256", None, overrides))
    said = capsys.readouterr().out
    assert "DiCo-H: width 416, depths [14, 12, 10, 12, 14], FFN ratio 4" in said
    assert "parameters   1,037,408,328" in said
    assert "arithmetic   194.03 GMACs an image forward, 1,192.12 TFLOP a training step (" in said
    assert "1024 images: 64 workers x 4 x 4 (" in said
    assert "1,000,000 steps, 1,024,000,000 images" in said
    table = [line.split() for line in said.splitlines() if re.match(r"  [0-3] ", line)]
    assert [row[0] for row in table] == ["0", "1", "2", "3"]
    assert [len(row) for row in table] == [12, 12, 14, 12]  # stage 2 is marked
    for row in table:
        memory = state_memory(1_037_408_328, int(row[0]), 64, "bf16", graphs=row[0] != "3")
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.ema, memory.buffers, memory.total)
        assert row[1:7] == [f"{part / 1e9:.2f}" for part in parts]
    assert "18,432 bytes a sample, 23.6 GB" in said
    assert "16.60 GB" in said
    assert "64        4 x 4" in said
    assert "<- this run" in said
    assert "whole path, blocks fused, CUDA graphs, H100, micro-batch 64: 268.3 images/s" in said


def test_without_micro_batch_there_is_no_accumulation(capsys: pytest.CaptureFixture[str]) -> None:
    main(resolve("dico-s-256", None, {}))
    assert "256 images: 8 workers x 32 x 1 (" in capsys.readouterr().out


def test_hours_and_cost_follow_from_the_step() -> None:
    plan = make(resolve("dico-h-256", None, {"hardware": {"price": 3.0}}))
    assert plan.step
    assert plan.hours
    stalls = 100 * plan.checkpoint.stall_s  # every 10,000 of 1,000,000 steps
    assert plan.hours * 3600 == pytest.approx(1_000_000 * plan.step.step_s + stalls)
    assert plan.cost == pytest.approx(plan.hours * 64 * 3)
    assert make(resolve("dico-h-256", None, {})).cost is None


def test_json_has_the_figures_and_the_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    assert cli(["plan", "--recipe", "dico-h-256", "--json", str(figures), "--plot", str(picture)]) == 0
    told = json.loads(figures.read_text())
    assert told["model"] == "DiCo-H"
    assert told["fit"]["micro_batch"] == 16
    assert [row["stage"] for row in told["stages"]] == [0, 1, 2, 3]
    assert told["ladder"][-1]["workers"] == 1024
    assert told["step"]["row"]["images_per_s"] == 268.3
    assert f"{told['step']['images_per_s']:,.0f} images/s" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml")


def test_what_does_not_fit_is_told_after_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(["plan", "--recipe", "dico-h-256", "--train.num_workers", "8", "--model.kernels", "torch"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "more GPUs help up to" in said.out
    assert said.err.count("\n") == 1
    assert said.err.endswith("set train.micro_batch 64\n")


@pytest.mark.parametrize(
    ("hardware", "train", "says"),
    [
        ({}, {"precision": "fp32", "micro_batch": 8}, "not known: no speed was measured with train.precision fp32"),
        ({}, {"offload": True}, "optimizer and EMA in the host's memory"),
    ],
)
def test_what_is_not_known_is_said(
    hardware: dict[str, Any], train: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(resolve("dico-h-256", None, {"train": train, "hardware": hardware}))
    assert says in capsys.readouterr().out


def test_files_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    config = resolve("dico-s-256", None, {})
    with pytest.raises(ConfigError, match="--json .*: No such file or directory"):
        main(config, json=str(tmp_path / "missing" / "plan.json"))
    with pytest.raises(ConfigError, match=r"--plot .*: write \.png"):
        main(config, plot=str(tmp_path / "plan.txt"))
    with pytest.raises(ConfigError, match="--plot .*: nothing to draw: no speed"):
        main(resolve("tiny-cpu", None, {}), plot=str(tmp_path / "plan.png"))


def test_planning_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from dico_ray.cli import main; main(['plan', '--recipe', 'dico-h-256']);"
        "print(sorted({'torch', 'ray', 'deepspeed', 'diffusers', 'webdataset', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
