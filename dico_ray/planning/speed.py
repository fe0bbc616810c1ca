"""Seconds of a micro-batch, from what was measured.

A row of `measured.json` gives the time of its own network, GPU and micro-batch. Others follow from it by a model of
two parts: launches, as much for every block whatever the micro-batch (from rows that differ in it alone), and work,
in proportion to the images: matrix products at the rate that the blocks' own reached, and memory traffic, in
proportion to the bytes that autograd keeps (from the rows too).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from dico_ray import measured
from dico_ray.accelerators import Accelerator, find
from dico_ray.arithmetic import training_flops
from dico_ray.config import Config, Model
from dico_ray.measured import Row
from dico_ray.planning.activations import activation_bytes, path_of
from dico_ray.planning.memory import gpu_of


@dataclass(frozen=True)
class Time:
    """Seconds of one micro-batch, forward and backward. launches_s: the part that does not depend on its size.

    least_s, most_s: what the other rows would have said. basis: measured, interpolated or extrapolated, and row: from.
    """

    seconds: float
    launches_s: float
    least_s: float
    most_s: float
    basis: str
    row: Row


def why_unknown(config: Config) -> str:
    """Why there is no forecast of the speed: nothing of the kind was measured. Empty if there is one."""
    train = config.train
    if train.precision != "bf16":
        return f"no speed was measured with train.precision {train.precision}"
    if train.offload:
        return "no speed was measured with train.offload true"
    if not train.compile and train.zero_stage < 3:
        return "no speed was measured with train.compile false"
    return ""


def micro_batch_time(config: Config, micro_batch: int) -> Time | None:
    """Of the config's network on hardware.gpu; None where `why_unknown` says so."""
    if why_unknown(config):
        return None
    path = path_of(config.train.compile, config.train.zero_stage)
    model, gpu = config.model, gpu_of(config)
    found = [(_estimate(row, model, gpu, path, micro_batch), row) for row in _rows(path)]
    best, row = min(found, key=lambda pair: _distance(pair[1], model, gpu, path, micro_batch))
    basis = "extrapolated"
    if _same(row, model, gpu) and row.what == measured.WHOLE:
        if row.micro_batch == micro_batch:
            basis = "measured"
        elif between := _bracket(row, micro_batch):
            basis, best = "interpolated", _interpolate(*between, micro_batch)
    times = [seconds for seconds, _ in found] if basis == "extrapolated" else [best]
    return Time(best, min(best, _launches(path) * sum(model.architecture.depths)), min(times), max(times), basis, row)


def _rows(path: str) -> list[Row]:
    """Those that forecasts rest on: one GPU's, or at ZeRO stage 3 (eager) what there is."""
    kinds = (measured.WHOLE, measured.BARE) if path == "compiled" else (measured.WHOLE_STAGE_3,)
    return [row for row in measured.rows() if row.what in kinds and (row.gpus == 1 or path == "eager")]


def _network(row: Row) -> Model:
    return Model(name=row.model)  # pyright: ignore[reportCallIssue]


def _same(row: Row, model: Model, gpu: Accelerator) -> bool:
    other = _network(row)
    return (other.architecture, other.latent_size, find(row.gpu)) == (model.architecture, model.latent_size, gpu)


def _distance(row: Row, model: Model, gpu: Accelerator, path: str, micro_batch: int) -> tuple[object, ...]:
    """Nearest first: the same network on the same GPU, then the whole path, then alike in work and micro-batch."""
    assert row.micro_batch
    apart = abs(math.log(_work(model, gpu, path) / _work(_network(row), gpu, path)))
    other = _network(row).architecture != model.architecture
    return other, find(row.gpu) != gpu, row.what == measured.BARE, apart, abs(math.log(micro_batch / row.micro_batch))


def _seconds(row: Row) -> float:
    assert row.images_per_s and row.micro_batch
    return row.micro_batch / row.images_per_s * (toll() if row.what == measured.BARE else 1)


def _estimate(row: Row, model: Model, gpu: Accelerator, path: str, micro_batch: int) -> float:
    own = find(row.gpu)
    assert own and row.micro_batch
    other, launches = _network(row), _launches(path)
    work = _seconds(row) - launches * sum(other.architecture.depths)
    scale = _work(model, gpu, path) / _work(other, own, path) * micro_batch / row.micro_batch
    return launches * sum(model.architecture.depths) + work * scale


def _work(model: Model, gpu: Accelerator, path: str) -> float:
    """Seconds of an image, before any row has its say: products, and bytes through memory."""
    products = training_flops(model) / (_products_share() * gpu.peak_flops)
    return products + _traffic() * activation_bytes(model, path, 2) / gpu.bandwidth


@cache
def _products_share() -> float:
    """Of the data sheet's rate that the blocks' 1x1 products reach by themselves."""
    row = next(row for row in measured.rows() if row.what == measured.PRODUCTS)
    gpu = find(row.gpu)
    assert gpu and row.tflops
    return row.tflops * 1e12 / gpu.peak_flops


@cache
def _traffic() -> float:
    """Bytes through memory for each that autograd keeps: what of the bare loop's time its products do not explain."""
    found = []
    for row in measured.rows():
        gpu = find(row.gpu)
        if row.what == measured.BARE and gpu and row.images_per_s:
            products = training_flops(_network(row)) / (_products_share() * gpu.peak_flops)
            kept = activation_bytes(_network(row), "compiled", 2)
            found.append((1 / row.images_per_s - products) * gpu.bandwidth / kept)
    return fmean(found)


@cache
def toll() -> float:
    """Time of the whole path over the bare loop's, from pairs of rows that differ in nothing else."""
    whole = {(row.model, row.gpu, row.micro_batch): row for row in measured.rows() if row.what == measured.WHOLE
             and row.gpus == 1}  # fmt: skip
    pairs = [(row, whole.get((row.model, row.gpu, row.micro_batch))) for row in _bare()]
    return fmean(bare.images_per_s / other.images_per_s for bare, other in pairs
                 if other and bare.images_per_s and other.images_per_s)  # fmt: skip


def _bare() -> list[Row]:
    return [row for row in measured.rows() if row.what == measured.BARE]


@cache
def _launches(path: str) -> float:
    """Seconds a block: where a line through the times at two micro-batches meets zero. None known for eager blocks."""
    if path != "compiled":
        return 0.0
    found = []
    for low, high in _ladders():
        slope = (_seconds(high) - _seconds(low)) / ((high.micro_batch or 0) - (low.micro_batch or 0))
        rest = _seconds(low) - slope * (low.micro_batch or 0)
        found.append(max(0.0, rest) / sum(_network(low).architecture.depths))
    return fmean(found) if found else 0.0


def _ladders() -> Iterator[tuple[Row, Row]]:
    """Least and most micro-batch of each network and GPU that was measured at several."""
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in _rows("compiled"):
        series.setdefault((row.model, row.gpu, row.what), []).append(row)
    for rows in series.values():
        rows.sort(key=lambda row: row.micro_batch or 0)
        if len(rows) > 1:
            yield rows[0], rows[-1]


def _bracket(row: Row, micro_batch: int) -> tuple[Row, Row] | None:
    """The neighbours on both sides, of the row's own network, GPU and kind."""
    ladder = sorted(
        (other.micro_batch or 0, other.images_per_s or 0, other) for other in _rows("compiled")
        if (other.model, other.gpu, other.what) == (row.model, row.gpu, row.what)
    )  # fmt: skip
    below = [other for size, _, other in ladder if size < micro_batch]
    above = [other for size, _, other in ladder if size > micro_batch]
    return (below[-1], above[0]) if below and above else None


def _interpolate(low: Row, high: Row, micro_batch: int) -> float:
    assert low.micro_batch and high.micro_batch
    share = (micro_batch - low.micro_batch) / (high.micro_batch - low.micro_batch)
    return _seconds(low) + share * (_seconds(high) - _seconds(low))
