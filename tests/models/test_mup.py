"""muP: which tensors are matrices, initial spreads, and what grows with the width while training, with and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dico_ray.diffusion.process import Diffusion
from dico_ray.models import DiCo, create_model
from dico_ray.models.mup import initialize, learning_rates

BASE, RATE, STEPS = 16, 4e-3, 4
WIDTHS = (16, 32, 64, 128)


def network(width: int, base: int | None = None) -> DiCo:
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=width, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
    if base:
        initialize(model, base)
    return model


def test_matrices_are_the_weights_whose_inputs_grow_with_the_width() -> None:
    small, large = (dict(network(width).named_parameters()) for width in (8, 16))
    rates = learning_rates(network(16), 8)
    assert rates.keys() == large.keys()
    for name, weight in large.items():
        tables = "embedding_table" in name  # a row is looked up: one input at any width
        grows = weight.ndim > 1 and not tables and weight[0].numel() == 2 * small[name][0].numel()
        assert rates[name] == (0.5 if grows else 1.0), name
    assert {name for name, rate in rates.items() if rate == 1 and large[name].ndim > 2} == {
        "x_embedder.proj.weight",
        *(name for name in large if name.endswith(".conv2.weight")),
    }


def test_at_its_base_width_it_is_the_standard_network() -> None:
    plain, mup = network(16), network(16, 16)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), mup.parameters(), strict=True))
    assert set(learning_rates(mup, 16).values()) == {1.0}


def test_initial_spreads_follow_the_base_width() -> None:
    """Weights with fixed inputs: the base width's own spread. Matrices: variance times base over width."""
    base, wide = (dict(model.named_parameters()) for model in (network(16), network(128, 16)))
    rates = learning_rates(network(128), 16)
    for name, weight in wide.items():
        if not weight.any():
            assert not base[name].any(), name
            continue
        expected = base[name].std() * math.sqrt(rates[name])
        # The standard error of a sample's deviation, of the smaller tensor, five times.
        tolerance = 5 / math.sqrt(2 * base[name].numel())
        assert float(weight.std() / expected) == pytest.approx(1, abs=tolerance), name


def changes(width: int, base: int | None) -> dict[str, float]:
    """Root mean square of what some steps of Adam change in a network's inner signals and its output."""
    model = network(width, base)
    rates = learning_rates(model, base) if base else {}
    adam = torch.optim.AdamW(
        [{"params": [p], "lr": RATE * rates.get(name, 1.0)} for name, p in model.named_parameters()], weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 16, 4, 8, 8, generator=generator)
    t, y = torch.randint(1000, (16,), generator=generator), torch.arange(16) % 10
    before = signals(model, x, t, y)
    for _ in range(STEPS):
        adam.zero_grad()
        Diffusion().training_losses(model, x, t, noise, y=y)["loss"].mean().backward()
        adam.step()
    after = signals(model, x, t, y)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


@torch.no_grad()
def signals(model: DiCo, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What leaves each stage, the embedders, and the network."""
    found: dict[str, Tensor] = {}
    parts = ("t_embedder_1", "t_embedder_3", "encoder_level_1", "latent", "up3_2", "decoder_level_2", "decoder_level_1")
    hooks = [
        model.get_submodule(part).register_forward_hook(lambda _, i, out, part=part: found.update({part: out}))
        for part in parts
    ]
    found["output"] = model(x, t, y)
    for hook in hooks:
        hook.remove()
    return found


def growth(base: int | None) -> dict[str, float]:
    """By signal, the exponent p of change ~ width^p, by least squares in the logarithms."""
    found = [changes(width, base) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    return {name: float(x @ torch.tensor([math.log(change[name]) for change in found]) / (x @ x)) for name in found[0]}


@pytest.mark.long
def test_no_signal_changes_more_in_wider_networks_and_without_mup_they_do() -> None:
    """The coordinate check (arXiv 2203.03466, appendix D.1): what a few steps change, over an eightfold width."""
    standard, mup = growth(None), growth(BASE)
    # Measured: muP -0.29 to 0.01; without it 0.24 (output) to 0.69 (last stage), and at the entrance alone -0.32.
    assert max(mup.values()) < 0.1, mup
    assert min(mup.values()) > -0.5, mup  # nor does anything stop to learn
    assert min(standard[name] for name in ("latent", "up3_2", "decoder_level_2", "decoder_level_1")) > 0.3, standard
    assert standard["output"] > 0.15, standard
