from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_ray.config import ARCHITECTURES
from dico_ray.models import DiCo, create_model

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((GOLDEN / "state_dict.json").read_text())
INITIAL = json.loads((GOLDEN / "init_std_DiCo-S.json").read_text())


def small_model(**overrides: Any) -> DiCo:
    arguments: dict[str, Any] = {
        "hidden_size": 8,
        "depths": (1, 1, 1, 1, 1),
        "ffn_ratio": 2,
        "num_classes": 10,
    }
    return DiCo(**(arguments | overrides))


def awake(model: DiCo) -> DiCo:
    """Random weights everywhere: a fresh model's gates and output are zero and would hide most mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(batch: int = 3, channels: int = 4, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.tensor([0, 500, 999])[:batch], torch.tensor([1, 0, 9])[:batch]


@pytest.fixture(scope="module")
def tiny() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "model_tiny.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def tiny_model(tiny: dict[str, np.ndarray]) -> DiCo:
    width, ratio, classes = (int(tiny[name]) for name in ("hidden_size", "ffn_ratio", "num_classes"))
    model = DiCo(width, tiny["depths"].tolist(), ratio, classes)
    weights = {name[2:]: torch.from_numpy(value) for name, value in tiny.items() if name.startswith("w:")}
    model.load_state_dict(weights)
    return model.double().eval()


@pytest.mark.parametrize("name", RELEASED)
def test_tensor_names_shapes_and_count_are_those_of_the_release(name: str):
    with torch.device("meta"):
        model = create_model(name)
    tensors = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(tensors.items()) == list(RELEASED[name]["tensors"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED[name]["num_parameters"]


@pytest.mark.parametrize("labels", ["y", "null"])
def test_output_equals_the_released_code(tiny: dict[str, np.ndarray], tiny_model: DiCo, labels: str):
    x, t, y = (torch.from_numpy(tiny[name]) for name in ("x", "t", "y"))
    if labels == "null":
        y = torch.full_like(y, tiny_model.null_label)
    expected = torch.from_numpy(tiny["output" if labels == "y" else "output_null"])
    with torch.no_grad():
        output = tiny_model(x, t, y)
    assert (output - expected).norm() / expected.norm() < 1e-6


@pytest.fixture(scope="module")
def fresh() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: parameter.detach() for name, parameter in create_model("DiCo-S").named_parameters()}


def test_initial_weights_have_the_released_spread(fresh: dict[str, Tensor]):
    assert fresh.keys() == INITIAL.keys()
    for name, (std, largest) in INITIAL.items():
        value = fresh[name]
        if largest == 0:
            assert not value.any(), name
            continue
        # Two samples of n values: a standard error of at most std / sqrt(2n) each, std / sqrt(n) for both.
        tolerance = 6 * std / math.sqrt(value.numel())
        assert abs(value.std().item() - std) < tolerance, name
        assert abs(value.mean().item()) < 6 * std / math.sqrt(value.numel()), name


def test_initial_weights_stay_within_the_xavier_bounds(fresh: dict[str, Tensor]):
    for name, (std, largest) in INITIAL.items():
        if largest == 0 or "embedding_table" in name or "t_embedder" in name:
            continue
        # A uniform distribution's bound is sqrt(3) standard deviations; many values come close to it.
        bound = math.sqrt(3) * std
        assert fresh[name].abs().max().item() == pytest.approx(bound, rel=0.06), name
        assert largest == pytest.approx(bound, rel=0.06), name
    exact = {
        "x_embedder.proj.weight": (36, 128),
        "encoder_level_1.0.conv2.weight": (9, 9 * 128),
        "encoder_level_1.0.conv4.weight": (128, 256),
        "up3_2.body.0.weight": (9 * 512, 9 * 1024),
    }
    for name, (fan_in, fan_out) in exact.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < fresh[name].abs().max().item() <= bound * (1 + 1e-6), name


def test_every_parameter_is_contiguous():
    # DeepSpeed flattens parameters and fails on any other layout.
    assert all(parameter.is_contiguous() for parameter in small_model().parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_computes_in_the_dtype_of_its_weights(dtype: torch.dtype):
    model, reference = awake(small_model()).eval(), awake(small_model()).double().eval()
    x, t, y = inputs()
    with torch.no_grad():
        output = model.to(dtype)(x, t, y)
        expected = reference(x, t, y)
    assert output.dtype == dtype
    assert output.is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (output.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(
    ("channels", "height", "width", "learn_sigma"), [(4, 8, 8, True), (3, 4, 12, True), (16, 12, 8, False)]
)
def test_shapes(channels: int, height: int, width: int, learn_sigma: bool):
    model = small_model(in_channels=channels, learn_sigma=learn_sigma)
    output = model(*inputs(2, channels, height, width))
    assert output.shape == (2, 2 * channels if learn_sigma else channels, height, width)


def test_gradients_reach_every_parameter():
    model = awake(small_model(class_dropout_prob=0.0))
    model(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_labels_are_dropped_in_training_alone_and_in_all_tables_at_once():
    model = awake(small_model(class_dropout_prob=0.5))
    x, t, y = inputs(1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), y.expand(64)
    model.eval()
    with torch.no_grad():
        kept, null = model(x, t, y), model(x, t, torch.full_like(y, model.null_label))
        model.train()
        torch.manual_seed(0)
        dropped = model(x, t, y)
    same_as_kept = torch.isclose(dropped, kept, atol=1e-5).all(dim=(1, 2, 3))
    same_as_null = torch.isclose(dropped, null, atol=1e-5).all(dim=(1, 2, 3))
    # Every image is wholly one or the other: a mask of its own for each table would give mixtures.
    assert torch.equal(same_as_kept, ~same_as_null)
    assert 16 < same_as_null.sum() < 48
    model.class_dropout_prob = 0.0
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), kept)


def test_num_classes_sets_the_null_label_and_the_tables():
    model = small_model(num_classes=7)
    assert model.null_label == 7
    tables = [value for name, value in model.named_parameters() if "embedding_table" in name]
    assert [table.shape[0] for table in tables] == [8, 8, 8]


def test_create_model_takes_overrides_and_knows_its_names():
    model = create_model("DiCo-tiny", hidden_size=8, num_classes=3, in_channels=2)
    assert model.x_embedder.proj.weight.shape == (8, 2, 3, 3)
    assert model.null_label == 3
    assert len(model.latent) == ARCHITECTURES["DiCo-tiny"].depths[2]
    with pytest.raises(ValueError, match=r"DiCo-Q.*DiCo-XL"):
        create_model("DiCo-Q")


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_refuses_latents_with_other_channels(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="in_channels"):
        small_model()(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 10)])
def test_refuses_sides_that_are_no_multiples_of_four(height: int, width: int):
    with pytest.raises(ValueError, match=f"{height} x {width}.*multiples of 4"):
        small_model()(*inputs(height=height, width=width))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 7},
        {"depths": (1, 1, 1)},
        {"depths": (1, 1, 0, 1, 1)},
        {"ffn_ratio": 0},
        {"num_classes": 0},
        {"in_channels": 0},
        {"class_dropout_prob": 1.5},
    ],
)
def test_refuses_impossible_sizes(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        small_model(**wrong)


def test_traces_into_one_graph():
    # fullgraph fails at the first Python branch on data; backend "eager" needs no compiler.
    model = awake(small_model())
    x, t, y = inputs()
    torch.manual_seed(0)
    expected = model(x, t, y)
    torch.manual_seed(0)
    traced = torch.compile(model, fullgraph=True, backend="eager")(x, t, y)
    torch.testing.assert_close(traced, expected)
