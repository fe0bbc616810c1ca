from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dico_ray.data.shards import sample_bytes
from dico_ray.operate.plan import main, shard_bytes, state_memory
from dico_ray.recipes import resolve


@given(
    parameters=st.integers(1, 10**10),
    stage=st.integers(0, 3),
    world=st.integers(1, 1024),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_memory_sums_and_never_grows_with_workers(parameters: int, stage: int, world: int, precision: str) -> None:
    one, many = state_memory(parameters, stage, 1, precision), state_memory(parameters, stage, world, precision)
    assert many.total == many.weights + many.gradients + many.optimizer + many.ema
    for name, divided_from in (("weights", 3), ("gradients", 2), ("optimizer", 1), ("ema", 0)):
        whole, part = getattr(one, name), getattr(many, name)
        if stage >= divided_from:
            assert whole / world <= part < whole / world + 1  # rounded up: all ranks together hold all of it
        else:
            assert part == whole


def test_memory_of_one_billion_by_stage() -> None:
    """ZeRO's arithmetic (arXiv 1910.02054, figure 1), with fp32 gradients where they accumulate, and an EMA."""
    n, workers = 10**9, 4
    told = [state_memory(n, stage, workers, "bf16") for stage in range(4)]
    assert [m.weights / n for m in told] == [2, 2, 2, 0.5]
    assert [m.gradients / n for m in told] == [2, 4, 1, 1]
    assert [m.optimizer / n for m in told] == [12, 3, 3, 3]
    assert [m.ema / n for m in told] == [1, 1, 1, 1]
    full = [state_memory(n, stage, workers, "fp32") for stage in range(4)]
    assert [m.weights / n for m in full] == [4, 4, 4, 1]
    assert [m.gradients / n for m in full] == [4, 4, 1, 1]
    assert [m.optimizer / n for m in full] == [8, 3, 3, 3]
    for stages in (told[1:], full[1:]):
        assert [m.total for m in stages] == sorted((m.total for m in stages), reverse=True)


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
