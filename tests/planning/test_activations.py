"""The formula against the very tensors that autograd keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dico_ray.config import Model
from dico_ray.models import create_model
from dico_ray.models.layers import Block
from dico_ray.planning.activations import PATHS, activation_bytes, block_bytes, working_bytes
from tests.planning.keeping import kept_bytes

SIZES = st.fixed_dictionaries({
    "hidden_size": st.integers(2, 12).map(lambda half: 2 * half),
    "depths": st.tuples(*[st.integers(1, 3)] * 5),
    "ffn_ratio": st.integers(1, 4),
    "in_channels": st.integers(1, 5),
})  # fmt: skip


@settings(deadline=None, max_examples=12)
@given(sizes=SIZES, batch=st.integers(1, 3), quarter=st.integers(1, 3))
def test_eager_bytes_are_what_autograd_keeps(sizes: dict[str, Any], batch: int, quarter: int) -> None:
    side = 4 * quarter
    network = create_model("DiCo-tiny", num_classes=7, class_dropout_prob=0.0, **sizes)
    t, y = torch.full((batch,), 5), torch.zeros(batch, dtype=torch.int64)
    kept = kept_bytes(network, torch.randn(batch, sizes["in_channels"], side, side), t, y)
    model = Model(name="DiCo-tiny", latent_size=side, num_classes=7, **sizes)  # pyright: ignore[reportCallIssue]
    assert kept == batch * activation_bytes(model, "eager", value=4)


@pytest.mark.slow
def test_compiled_bytes_are_what_a_compiled_block_keeps() -> None:
    """By the partition that Inductor compiles, without its code: that needs no compiler here."""
    width, batch, side, ffn_ratio = 16, 2, 8, 3
    block = Block(width, ffn_ratio)
    block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    condition = torch.randn(batch, width, requires_grad=True)
    kept = kept_bytes(block, torch.randn(batch, side, side, width, requires_grad=True), condition)
    condition_bytes = condition.numel() * 4
    assert kept == batch * block_bytes(width, ffn_ratio, side**2, "compiled", value=4) + condition_bytes


@pytest.mark.parametrize("ffn_ratio", [2, 4])
def test_the_peak_of_a_training_step_is_foreseen(ffn_ratio: int) -> None:
    """Bytes that the allocator hands out and takes back, forward and backward, eager: within 2%, never over."""
    sizes: dict[str, Any] = {"hidden_size": 32, "depths": (2,) * 5, "ffn_ratio": ffn_ratio, "num_classes": 7}
    batch, model = 4, Model(name="DiCo-tiny", **sizes)
    network = create_model("DiCo-tiny", class_dropout_prob=0.0, **sizes)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, t, y = torch.randn(batch, 4, 32, 32), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(x, t, y).square().mean().backward()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    peak = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    foreseen = batch * (activation_bytes(model, "eager", value=4) + working_bytes(model, value=4))
    assert 0.98 < foreseen / peak <= 1


def test_recomputation_keeps_inputs_and_one_block() -> None:
    """One block a stage: nothing but the blocks' inputs is added to what the largest keeps."""
    model = Model(name="DiCo-tiny", hidden_size=16, depths=(1,) * 5, ffn_ratio=2, latent_size=16)  # pyright: ignore
    whole = {path: activation_bytes(model, path, value=2) for path in PATHS}
    lean = {path: activation_bytes(model, path, value=2, recompute=True) for path in PATHS}
    sizes = [(16, 256), (32, 64), (64, 16), (32, 64), (32, 256)]
    for path in PATHS:
        blocks = [block_bytes(width, 2, area, path, value=2) for width, area in sizes]
        inputs = 2 * sum(width * area for width, area in sizes)
        assert whole[path] - sum(blocks) == lean[path] - inputs - max(blocks)
        assert lean[path] < whole[path]


@pytest.mark.slow
def test_fused_bytes_are_what_the_kernels_keep() -> None:
    """By Triton's interpreter, which has to be asked for before Triton is imported: in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("keeping.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = [line.split() for line in done.stdout.splitlines()]
    assert len(paths) == 2
    assert all(kept == foreseen for kept, foreseen in paths)
    assert paths[0] != paths[1]
