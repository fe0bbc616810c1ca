"""`dico-ray bench forward`: one GPU's rate of network evaluations by each way to run it, in one run."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from dico_ray.bench import network as ways
from dico_ray.bench.classes import by_class
from dico_ray.config import Config
from dico_ray.models import DiCo, graph_inference


def main(
    config: Config, *, verbose: bool, variants: list[str], micro_batches: list[int], seconds: float, json: str
) -> None:
    """Prints and stores the rows; arguments and errors as in `bench train`."""
    ways.check_variants(variants, without=("engine",))
    device = ways.device_of(config)
    print(ways.HEADER)

    def measure(variant: str, batch: int, expected: Tensor) -> dict[str, Any]:
        return measure_forward(variant, config, device, batch, seconds, expected)

    rows = ways.each_way(config, device, variants, micro_batches, measure)
    ways.finish(1, rows, device, json)


def measure_forward(
    variant: str, config: Config, device: torch.device, batch: int, seconds: float, expected: Tensor
) -> dict[str, Any]:
    """One row. expected: the plain network's output, to compare with. Raises as `network.make_network`."""
    network = ways.make_network(variant, config, device).eval().requires_grad_(False)
    if variant == "graphed":
        assert isinstance(network, DiCo)
        graph_inference(network)
    apart = ways.difference(variant, network, config, device, expected)
    x, _, t, y = ways.make_inputs(config, device, batch)

    @torch.no_grad()
    def forward() -> None:
        network(x, t, y)

    began = time.perf_counter()
    forward()
    ways.synchronize(device)
    first = time.perf_counter() - began
    rate = batch / ways.seconds_of(forward, device, seconds)
    return {
        **ways.row(variant, config, device, batch, rate, ways.image_flops(variant, config)),
        "first_s": first, "difference": apart, "classes": by_class(forward, device),
    }  # fmt: skip
