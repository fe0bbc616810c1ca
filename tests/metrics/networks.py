"""An Inception with random weights that keep its activations alive, for tests that compare two uses of one network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def random_inception(path: Path, seed: int = 0) -> Path:
    """Writes weights by torch-fidelity's names to `path`, and returns it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
            return None

    torch.save({}, path)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.1
        if isinstance(module, nn.Linear):
            module.weight.data /= 10  # logits of some units, as a trained network's
            module.bias.data = torch.randn(module.out_features, generator=generator)
    torch.save(network.state_dict(), path)
    return path
