"""`dico-ray bench train`: one GPU's training rate by each way to run the network, in one run.

A bare loop, without data and without DeepSpeed: forward, loss, backward, gradients summed in fp32; then AdamW on fp32
masters and the EMA, once a train.global_batch. Micro-batches and the update are timed apart, and the rate is that of
their sum. The variant "engine" has the project's own engine in that loop's place: what it is slower by is DeepSpeed's
toll.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dico_ray.bench import network as ways
from dico_ray.bench.classes import by_class
from dico_ray.config import Config
from dico_ray.diffusion.process import Diffusion
from dico_ray.models import use_kernels
from dico_ray.settings import build, merge

_FLOPS_OF_FORWARD = 3  # a backward pass costs two forward ones


def main(
    config: Config, *, verbose: bool, variants: list[str], micro_batches: list[int], seconds: float, json: str
) -> None:
    """Prints and stores the rows.

    variants: some of `network.VARIANTS`. micro_batches: each is measured. seconds: for which each is timed, at least.
    json: a file for the figures. Raises ConfigError for a variant that is unknown.
    """
    ways.check_variants(variants)
    device = ways.device_of(config)
    print(ways.HEADER)

    def timed(call: Callable[[], Any], device: torch.device) -> float:
        return ways.seconds_of(call, device, seconds)

    def measure(variant: str, batch: int, expected: Tensor) -> dict[str, Any]:
        if variant == "engine":
            return measure_engine(config, device, batch, timed, expected)
        return measure_training(variant, config, device, batch, seconds, expected)

    with _group_of_one(device) if "engine" in variants else nullcontext():
        rows = ways.each_way(config, device, variants, micro_batches, measure)
    ways.finish(0, rows, device, json)


class Update:
    """fp32 masters, gradients summed in fp32, AdamW, EMA: a step's end. For fp32 weights the masters are these."""

    def __init__(self, network: nn.Module, config: Config, device: torch.device) -> None:
        train = config.train
        self._weights = [p for p in network.parameters() if p.requires_grad]
        self._low = self._weights[0].dtype != torch.float32
        self._masters = [p.detach().float().requires_grad_() for p in self._weights] if self._low else self._weights
        if self._low:
            for master in self._masters:
                master.grad = torch.zeros_like(master)
        self._adam = torch.optim.AdamW(
            self._masters, train.lr, train.betas, weight_decay=train.weight_decay, fused=device.type == "cuda"
        )
        self._averages = [master.detach().clone() for master in self._masters]
        self._rate = 1 - train.ema_decay

    @torch.no_grad()
    def add(self) -> None:
        """After a micro-batch's backward pass."""
        if self._low:
            pairs = [(m.grad, w.grad) for m, w in zip(self._masters, self._weights, strict=True) if w.grad is not None]
            sums, parts = zip(*pairs, strict=True)
            torch._foreach_add_(sums, parts)  # pyright: ignore[reportPrivateImportUsage]
            for weight in self._weights:
                weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self._adam.step()
        masters = [master.detach() for master in self._masters]
        torch._foreach_lerp_(self._averages, masters, self._rate)  # pyright: ignore[reportPrivateImportUsage]
        if self._low:
            torch._foreach_copy_(list[Tensor](self._weights), masters)  # pyright: ignore[reportPrivateImportUsage]
        self._adam.zero_grad(set_to_none=not self._low)


def measure_training(
    variant: str, config: Config, device: torch.device, batch: int, seconds: float, expected: Tensor
) -> dict[str, Any]:
    """One row. expected: the plain network's output, to compare with. Raises as `network.make_network`."""
    network = ways.make_network(variant, config, device)
    apart = ways.difference(variant, network, config, device, expected)
    update, diffusion = Update(network, config, device), Diffusion()
    x, noise, t, y = ways.make_inputs(config, device, batch)
    accumulate = max(1, config.train.global_batch // batch)

    def micro_batch() -> None:
        loss = diffusion.training_losses(network, x, t, noise, y=y)["loss"].mean()
        (loss / accumulate).backward()
        update.add()

    began = time.perf_counter()
    micro_batch()
    update.step()
    ways.synchronize(device)
    first = time.perf_counter() - began
    micro = ways.seconds_of(micro_batch, device, seconds)
    step = ways.seconds_of(update.step, device, seconds / 4)
    rate = accumulate * batch / (accumulate * micro + step)
    flops = _FLOPS_OF_FORWARD * ways.image_flops(variant, config)

    classes = by_class(micro_batch, device)
    for kind, milliseconds in by_class(update.step, device).items():
        classes[kind] = classes.get(kind, 0.0) + milliseconds / accumulate
    return {
        **ways.row(variant, config, device, batch, rate, flops), "first_s": first, "difference": apart,
        "micro_batch_ms": micro * 1e3, "update_ms": step * 1e3, "accumulate": accumulate, "classes": classes,
    }  # fmt: skip


def measure_engine(
    config: Config,
    device: torch.device,
    batch: int,
    timed: Callable[[Callable[[], Any], torch.device], float],
    expected: Tensor | None,
) -> dict[str, Any]:
    """The row "engine": whole optimizer steps at train.zero_stage, on torch.distributed's default group.

    Raises as `prepare`.

    timed: mean seconds of a call, which every worker makes as often. expected: the plain network's output; None: it is
    not compared. Rates, TFLOP/s and memory are a worker's.
    """
    from dico_ray.training.ema import EMA
    from dico_ray.training.prepare import prepare

    workers = dist.get_world_size()
    accumulate = max(1, config.train.global_batch // (batch * workers))
    sizes = {"global_batch": accumulate * batch * workers, "micro_batch": batch, "num_workers": workers}
    precision = {} if device.type == "cuda" else {"precision": "fp32"}
    config = build(merge(config.model_dump(), {"train": {**sizes, **precision}}))
    network, train = ways.make_dico(config, device), config.train
    apart = None
    if expected is not None:
        # Before DeepSpeed takes the network over: at stage 3 its weights are gathered in training passes alone.
        use_kernels(network, config.model.kernels, device, train.recompute_gelu)
        apart = ways.difference("engine", network, config, device, expected)
    diffusion = Diffusion()
    x, noise, t, y = ways.make_inputs(config, device, batch)
    began = time.perf_counter()
    engine, path = prepare(network, config, device)
    with closing(engine):
        ema = EMA(engine, train.ema_decay)

        def step() -> None:
            for _ in range(accumulate):
                engine.backward(diffusion.training_losses(engine, x, t, noise, y=y)["loss"].mean())
            ema.update(1)

        step()
        ways.synchronize(device)
        first = time.perf_counter() - began
        took = timed(step, device)
        classes = {kind: milliseconds / accumulate for kind, milliseconds in by_class(step, device).items()}
    flops = _FLOPS_OF_FORWARD * ways.image_flops("engine", config)
    return {
        **ways.row("engine", config, device, batch, accumulate * batch / took, flops), "first_s": first,
        "difference": apart, "micro_batch_ms": took / accumulate * 1e3, "accumulate": accumulate,
        "what": f"training, engine at ZeRO-{train.zero_stage} with EMA, {path}", "classes": classes,
    }  # fmt: skip


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    """A torch.distributed group of this process alone, unless there is a group already.

    One for all rows: DeepSpeed keeps hold of the first that it sees.
    """
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher's variable
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
