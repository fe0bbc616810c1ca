from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dico_ray.config import Model
from dico_ray.data.shards import sample_bytes
from dico_ray.models import create_model
from dico_ray.operate.plan import main, parameter_count, shard_bytes, state_memory
from dico_ray.recipes import resolve

RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "state_dict.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_those_of_the_released_models(name: str) -> None:
    assert parameter_count(Model(name=name)) == RELEASED[name]["num_parameters"]  # pyright: ignore[reportCallIssue]


@settings(deadline=None, max_examples=15)
@given(
    half=st.integers(2, 20),
    depths=st.tuples(*[st.integers(1, 3)] * 5),
    ratio=st.integers(1, 5),
    classes=st.integers(1, 30),
    channels=st.integers(1, 9),
)
def test_counts_are_those_of_the_network(
    half: int, depths: tuple[int, int, int, int, int], ratio: int, classes: int, channels: int
) -> None:
    sizes = {
        "hidden_size": 2 * half, "depths": depths, "ffn_ratio": ratio, "num_classes": classes, "in_channels": channels,
    }  # fmt: skip
    with torch.device("meta"):
        network = create_model("DiCo-tiny", **sizes)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert parameter_count(Model(name="DiCo-tiny", **sizes)) == counted  # pyright: ignore


def test_latent_size_does_not_count() -> None:
    sizes = [Model(latent_size=size) for size in (8, 64)]  # pyright: ignore[reportCallIssue]
    assert parameter_count(sizes[0]) == parameter_count(sizes[1])


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
