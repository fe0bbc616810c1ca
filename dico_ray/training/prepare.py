"""A network as training runs it: kernels, compilation, graphs and learning rates by the settings, under the engine."""

from __future__ import annotations

import torch

from dico_ray.config import Config
from dico_ray.models import UNITS, DiCo, compile_blocks, graph_stages, use_kernels
from dico_ray.models.mup import learning_rates
from dico_ray.training.engine import Engine


def prepare(model: DiCo, config: Config, device: torch.device) -> tuple[Engine, str]:
    """The engine, which takes the model over, and a line that says which path runs and why.

    model: fp32 weights, the same on every rank. Raises ConfigError where model.kernels cannot run.
    """
    train = config.train
    path = use_kernels(model, config.model.kernels, device, train.recompute_gelu)
    if model.final_layer.fused and not train.recompute_gelu:
        path += ", GELU kept"
    # At stage 3 hooks gather a block's weights, to a new place each time: neither compiled code nor a graph knows it.
    whole = device.type == "cuda" and train.zero_stage < 3
    if whole and train.compile:
        compile_blocks(model)
    rates = learning_rates(model, train.mup_width) if train.mup_width else None
    engine = Engine(model, train, device, rates, UNITS)
    if whole and train.cuda_graphs:
        graph_stages(model, engine.frees_gradients)
        path += ", CUDA graphs"
    return engine, path
