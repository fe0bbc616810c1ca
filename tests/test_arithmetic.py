"""Parameters and multiply-adds against the released models, the paper's table, and the network itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dico_ray.arithmetic import forward_macs, parameter_count, stage_widths, training_flops
from dico_ray.config import Model
from dico_ray.models import create_model

RELEASED = json.loads((Path(__file__).parent / "golden" / "state_dict.json").read_text())
# arXiv 2505.11196: GMACs at 32x32 latents.
PUBLISHED = {"DiCo-S": 4.25, "DiCo-B": 16.88, "DiCo-L": 60.24, "DiCo-XL": 87.30, "DiCo-H": 194.15}
_ROUNDING = 0.005
# What the paper counts beyond convolutions and linear layers comes to this many operations for every value of
# every block's activations (say two for each of two norms and one for the channel means), in all five rows.
_PUBLISHED_EXTRA = 5

SIZES = st.fixed_dictionaries({
    "hidden_size": st.integers(2, 20).map(lambda half: 2 * half),
    "depths": st.tuples(*[st.integers(1, 3)] * 5),
    "ffn_ratio": st.integers(1, 5),
    "num_classes": st.integers(1, 30),
    "in_channels": st.integers(1, 9),
})  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_those_of_the_released_models(name: str) -> None:
    assert parameter_count(Model(name=name)) == RELEASED[name]["num_parameters"]  # pyright: ignore[reportCallIssue]


@settings(deadline=None, max_examples=15)
@given(sizes=SIZES)
def test_counts_are_those_of_the_network(sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = create_model("DiCo-tiny", **sizes)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert parameter_count(Model(name="DiCo-tiny", **sizes)) == counted  # pyright: ignore


def test_latent_size_adds_arithmetic_and_no_parameters() -> None:
    small, large = (Model(latent_size=size) for size in (8, 64))  # pyright: ignore[reportCallIssue]
    assert parameter_count(small) == parameter_count(large)
    assert forward_macs(large) > 60 * forward_macs(small)  # 64 times the pixels, and what runs once an image


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_the_paper_s(name: str) -> None:
    """Alone under the published figure by at most 0.4%; with what else the paper counts, equal but for rounding."""
    model = Model(name=name)  # pyright: ignore[reportCallIssue]
    a, pixels = model.architecture, (1024, 256, 64, 256, 1024)
    values = sum(d * w * p for d, w, p in zip(a.depths, stage_widths(a), pixels, strict=True))
    macs = forward_macs(model)
    assert 0.996 < macs / 1e9 / PUBLISHED[name] < 1
    assert (macs + _PUBLISHED_EXTRA * values) / 1e9 == pytest.approx(PUBLISHED[name], abs=_ROUNDING)


@settings(deadline=None, max_examples=15)
@given(sizes=SIZES, quarter=st.integers(1, 4))
def test_multiply_adds_are_those_of_the_network(sizes: dict[str, Any], quarter: int) -> None:
    """PyTorch counts two operations for each."""
    side = 4 * quarter
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = create_model("DiCo-tiny", **sizes)
        x, t, y = torch.empty(1, sizes["in_channels"], side, side), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        network.eval()(x, t, y)
    model = Model(name="DiCo-tiny", latent_size=side, **sizes)  # pyright: ignore
    assert 2 * forward_macs(model) == counter.get_total_flops()


def test_training_is_what_pytorch_counts_but_for_two_oddities() -> None:
    """Inputs need no gradient, and PyTorch counts a depthwise convolution's weight gradient as a dense one's."""
    d, area = 24, 64
    sizes = {"hidden_size": d, "depths": (1, 2, 1, 1, 2), "ffn_ratio": 3, "num_classes": 5, "in_channels": 3}
    model = Model(name="DiCo-tiny", latent_size=8, **sizes)  # pyright: ignore
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = create_model("DiCo-tiny", **sizes)
        network(torch.empty(1, 3, 8, 8), torch.empty(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    no_gradient = 9 * 3 * d * area + 256 * (d + 2 * d + 4 * d)  # input convolution, and the timestep's sinusoids
    stages = zip(sizes["depths"], stage_widths(model.architecture), (area, area // 4, area // 16, area // 4, area),
                 strict=True)  # fmt: skip
    too_much = sum(depth * 9 * width * (width - 1) * pixels for depth, width, pixels in stages)
    assert training_flops(model) == counter.get_total_flops() + 2 * no_gradient - 2 * too_much
