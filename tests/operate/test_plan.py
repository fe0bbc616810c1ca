from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dico_ray.data.shards import sample_bytes
from dico_ray.operate.plan import main, shard_bytes
from dico_ray.planning.memory import state_memory
from dico_ray.recipes import resolve


def test_shard_bytes_are_the_format_s() -> None:
    config = resolve("dico-xl-512", None, {})
    assert shard_bytes(config, 10) == 10 * sample_bytes(4, 64, 64)
    assert sample_bytes(4, 32, 32) == 3 * 512 + 512 * 33  # 16 KB of values and a .npy header


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
    assert [len(row) for row in table] == [6, 6, 8, 6]  # stage 2 is marked
    for row in table:
        memory = state_memory(1_037_408_328, int(row[0]), 64, "bf16")
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.ema, memory.total)
        assert row[1:6] == [f"{part / 1e9:.2f}" for part in parts]
    assert "18,432 bytes a sample, 23.6 GB" in said
    assert "16.60 GB" in said


def test_without_micro_batch_there_is_no_accumulation(capsys: pytest.CaptureFixture[str]) -> None:
    main(resolve("dico-s-256", None, {}))
    assert "256 images: 8 workers x 32 x 1 (" in capsys.readouterr().out


def test_planning_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from dico_ray.cli import main; main(['plan', '--recipe', 'dico-h-256']);"
        "print(sorted({'torch', 'ray', 'deepspeed', 'diffusers', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
