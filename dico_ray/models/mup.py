"""muP for DiCo: initial weights and learning rates under which the best learning rate moves less with the width.

The rules for Adam (arXiv 2203.03466, table 3; in the form that changes neither the network nor what it computes):

    matrices, whose inputs grow with the width     initial variance 1 / inputs     learning rate x base / width
    input weights, whose inputs do not, and biases those of the base width         learning rate as it is
    output weights (zero at the start)             zero                            learning rate x base / width

The rate that is given is thus the one of the base width, where a network starts and learns as it does without muP.
Widths of all stages are multiples of hidden_size, so one ratio serves them all. Matrices are all linear layers and
convolutions but three kinds that read so many numbers at any width: the input convolution (9 for each channel of the
latents), the first layer of the timestep embedders (256 sinusoids) and depthwise convolutions (9).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dico_ray.models.dico import DiCo


def ratio(model: DiCo, base_width: int) -> float:
    """Base width over the model's own (its hidden_size)."""
    return base_width / model.x_embedder.proj.out_channels


def learning_rates(model: DiCo, base_width: int) -> dict[str, float]:
    """By parameter name, what its learning rate is multiplied by: `ratio` for matrices, 1 for all others."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not _has_fixed_inputs(name, module)
    }
    share = ratio(model, base_width)
    return {name: share if name in matrices else 1.0 for name, _ in model.named_parameters()}


@torch.no_grad()
def initialize(model: DiCo, base_width: int) -> None:
    """Initial weights by the usual rules (`DiCo.initialize_weights`) -> by muP's, in place.

    Xavier's variance, 2 / (inputs + outputs), falls with the width as a matrix's should. It also falls for weights
    with fixed inputs, which get back the variance that they have at the base width. The last layer of the timestep
    embedders has a fixed deviation instead, and is a matrix.
    """
    share = ratio(model, base_width)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if isinstance(module, nn.Conv2d) and _has_fixed_inputs(name, module):
            # As `initialize_weights` counts: outputs of the input convolution are D, of a depthwise one 9C.
            depthwise = module.groups > 1
            inputs, outputs = (
                (9, 9 * module.out_channels) if depthwise else (9 * module.in_channels, module.out_channels)
            )
            module.weight.mul_(math.sqrt((inputs + outputs) / (inputs + outputs * share)))
        elif name.startswith("t_embedder") and name.endswith("mlp.2"):
            module.weight.mul_(math.sqrt(share))


def _has_fixed_inputs(name: str, module: nn.Linear | nn.Conv2d) -> bool:
    """Whether each output reads as many numbers at any width."""
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    return depthwise or name == "x_embedder.proj" or (name.startswith("t_embedder") and name.endswith("mlp.0"))
