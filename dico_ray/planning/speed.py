"""Seconds of a micro-batch, from what was measured.

A row of `measured.json` gives the time of its own network, GPU and micro-batch. Others follow from it by a model of
two parts: launches, as much for every block whatever the micro-batch (from rows that differ in it alone), and work,
in proportion to the images: matrix products at the rate that the blocks' own reached, and memory traffic, in
proportion to the bytes that autograd keeps (from the rows too).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from statistics import fmean

from dico_ray import measured
from dico_ray.accelerators import Accelerator, find
from dico_ray.arithmetic import training_flops
from dico_ray.config import Config, Model
from dico_ray.measured import Row
from dico_ray.planning.activations import activation_bytes, path_of
from dico_ray.planning.memory import gpu_of

_WHOLE = {"fused": measured.WHOLE_FUSED, "compiled": measured.WHOLE, "eager": measured.WHOLE_STAGE_3}


@dataclass(frozen=True)
class Time:
    """Seconds of one micro-batch, forward and backward. launches_s: the part that does not depend on its size.

    least_s, most_s: what the other rows would have said. basis: measured, interpolated or extrapolated, and row: from.
    Only one GPU's time is measured or interpolated: what several lose to each other, no row of one GPU tells.
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
    if train.zero_stage == 3 and path_of(config, 3).startswith("fused"):
        return (
            "two networks alone were measured at train.zero_stage 3 with fused blocks: DeepSpeed's work on the host "
            "binds them, at 0.22 to 0.39 of stage 1's rate, by host"
        )
    path = path_of(config, train.zero_stage)
    if path == "eager" and train.zero_stage < 3:
        return "no speed was measured with train.compile false"
    if path.startswith("fused") and not train.cuda_graphs:
        return "no speed was measured with train.cuda_graphs false"
    return ""


def micro_batch_time(
    config: Config, micro_batch: int, rows: tuple[Row, ...] | None = None, workers: int = 1
) -> Time | None:
    """Of the config's network on hardware.gpu; None where `why_unknown` says so. rows: instead of measured.json's.

    workers: how many GPUs step together. The time is of one's own work; the label and the range tell of them.
    """
    if why_unknown(config):
        return None
    path = path_of(config, config.train.zero_stage)
    ladders = _ladders(rows or measured.rows(), path.split(",")[0])
    # The rows of compiled blocks are from before there were CUDA graphs, those of fused ones make the GELU again.
    alike = path in ("eager", "fused") or (path == "compiled" and not config.train.cuda_graphs)
    time = ladders.time(config.model, gpu_of(config), micro_batch, workers, alike)
    # On one and two GPUs stage 2 runs at stage 1's rate (0.998 to 1.025 of it), but no row of the whole path tells.
    return replace(time, basis="extrapolated") if config.train.zero_stage == 2 else time


@cache
def _ladders(rows: tuple[Row, ...], path: str) -> Ladders:
    return Ladders(rows, path)


@dataclass(frozen=True)
class Ladders:
    """Measured rows, and what they tell together of networks whose blocks run by `path`: fused, compiled or eager."""

    rows: tuple[Row, ...]
    path: str

    def time(self, model: Model, gpu: Accelerator, micro_batch: int, workers: int = 1, alike: bool = True) -> Time:
        """alike: whether the rows were run by the same settings, and may be called measured."""
        found = [(self._estimate(row, model, gpu, micro_batch, self.launches), row) for row in self.training]
        best, row = min(found, key=lambda pair: self._distance(pair[1], model, gpu, micro_batch))
        basis = "extrapolated"
        same = _same(row, model, gpu)
        between = self._bracket(row, micro_batch) if same else None
        if between and row.micro_batch != micro_batch:
            best = self._interpolate(*between, micro_batch)
        if same and row.what == self._whole and row.gpus == workers == 1 and alike:
            basis = "measured" if row.micro_batch == micro_batch else "interpolated" if between else basis
        times = [best, *(seconds for seconds, _ in found if basis == "extrapolated")]
        if self.path == "eager":
            times.append(self._estimate(row, model, gpu, micro_batch, launches=0.0))
        launches = min(best, self.launches * sum(model.architecture.depths))
        return Time(best, launches, min(times), max(times), basis, row)

    @cached_property
    def training(self) -> list[Row]:
        """The rows that forecasts rest on. Eager blocks are ZeRO stage 3's; several GPUs' rows hold collectives too."""
        return [row for row in self.rows if row.what in (self._whole, *([] if self.path == "eager" else [self._bare]))]

    @property
    def _whole(self) -> str:
        """Rows of the whole path: Ray, the stream, DeepSpeed."""
        return _WHOLE[self.path]

    @property
    def _bare(self) -> str:
        """Rows of training without data, from which traffic follows; for eager blocks those of compiled ones."""
        return measured.ENGINE_FUSED if self.path == "fused" else measured.BARE

    @cached_property
    def products_share(self) -> float:
        """Of the data sheet's rate that the blocks' 1x1 products reach by themselves."""
        row = next(row for row in self.rows if row.what == measured.PRODUCTS)
        assert row.tflops
        return row.tflops * 1e12 / _gpu(row).peak_flops

    @cached_property
    def traffic(self) -> float:
        """Bytes through memory for each that autograd keeps: what of the bare loop's time products do not explain."""
        found = []
        for row in (row for row in self.rows if row.what == self._bare):
            products = training_flops(_network(row)) / (self.products_share * _gpu(row).peak_flops)
            kept = activation_bytes(_network(row), "fused" if self.path == "fused" else "compiled", 2)
            found.append((_plain_seconds(row) / _micro(row) - products) * _gpu(row).bandwidth / kept)
        return fmean(found)

    @cached_property
    def toll(self) -> float:
        """Time of the whole path over the bare loop's, from pairs of rows that differ in nothing else; 1 without."""
        of_one = [row for row in self.rows if row.gpus == 1]
        whole = {(row.model, row.gpu, row.micro_batch): row for row in of_one if row.what == self._whole}
        bare = {(row.model, row.gpu, row.micro_batch): row for row in of_one if row.what == self._bare}
        pairs = [_plain_seconds(whole[key]) / _plain_seconds(bare[key]) for key in whole.keys() & bare.keys()]
        return fmean(pairs) if pairs else 1.0

    @cached_property
    def launches(self) -> float:
        """Seconds a block: where a line through the times at two micro-batches meets zero; 0 if none were measured.

        Of eager blocks at ZeRO stage 3 no such two were: all that the model of work does not explain is counted here.
        """
        if self.path == "eager":
            return fmean(
                max(0.0, self._seconds(row) - _micro(row) * self._work(_network(row), _gpu(row)))
                / sum(_network(row).architecture.depths)
                for row in self.training
            )
        found = []
        for low, high in self._pairs():
            slope = (self._seconds(high) - self._seconds(low)) / (_micro(high) - _micro(low))
            rest = self._seconds(low) - slope * _micro(low)
            found.append(max(0.0, rest) / sum(_network(low).architecture.depths))
        return fmean(found) if found else 0.0

    def _pairs(self) -> Iterator[tuple[Row, Row]]:
        """Least and most micro-batch of each network, GPU and kind that was measured at several."""
        series: dict[tuple[object, ...], list[Row]] = {}
        for row in sorted(self.training, key=_micro):
            series.setdefault(_series(row), []).append(row)
        return ((rows[0], rows[-1]) for rows in series.values() if _micro(rows[0]) < _micro(rows[-1]))

    def _seconds(self, row: Row) -> float:
        """Of the row's micro-batch through the whole path."""
        return _plain_seconds(row) * (self.toll if row.what == self._bare else 1)

    def _work(self, model: Model, gpu: Accelerator) -> float:
        """Seconds of an image, before any row has its say: products, and bytes through memory."""
        products = training_flops(model) / (self.products_share * gpu.peak_flops)
        return products + self.traffic * activation_bytes(model, self.path, 2) / gpu.bandwidth

    def _estimate(self, row: Row, model: Model, gpu: Accelerator, micro_batch: int, launches: float) -> float:
        other = _network(row)
        work = self._seconds(row) - launches * sum(other.architecture.depths)
        scale = self._work(model, gpu) / self._work(other, _gpu(row)) * micro_batch / _micro(row)
        return launches * sum(model.architecture.depths) + work * scale

    def _distance(self, row: Row, model: Model, gpu: Accelerator, micro_batch: int) -> tuple[object, ...]:
        """Nearest first: one GPU's, the same network, GPU, the whole path, then alike in work and in micro-batch.

        Of another network the largest micro-batch, whatever this one's: rows do not take turns as it grows.
        """
        other = _network(row)
        size = abs(math.log(micro_batch / _micro(row))) if _same(row, model, gpu) else -_micro(row)
        apart = abs(math.log(self._work(model, gpu) / self._work(other, gpu)))
        return (
            row.gpus, other.architecture != model.architecture, _gpu(row) != gpu, row.what == self._bare,
            apart, size,
        )  # fmt: skip

    def _bracket(self, row: Row, micro_batch: int) -> tuple[Row, Row] | None:
        """The neighbours on both sides, of the row's own network, GPU and kind."""
        series = [other for other in sorted(self.training, key=_micro) if _series(other) == _series(row)]
        below = [other for other in series if _micro(other) < micro_batch]
        above = [other for other in series if _micro(other) > micro_batch]
        return (below[-1], above[0]) if below and above else None

    def _interpolate(self, low: Row, high: Row, micro_batch: int) -> float:
        share = (micro_batch - _micro(low)) / (_micro(high) - _micro(low))
        return self._seconds(low) + share * (self._seconds(high) - self._seconds(low))


def _series(row: Row) -> tuple[object, ...]:
    """What rows have in common that differ in the micro-batch alone."""
    return row.model, row.gpu, row.what, row.gpus


def _network(row: Row) -> Model:
    return Model(name=row.model)  # pyright: ignore[reportCallIssue]


def _same(row: Row, model: Model, gpu: Accelerator) -> bool:
    other = _network(row)
    return (other.architecture, other.latent_size, _gpu(row)) == (model.architecture, model.latent_size, gpu)


def _gpu(row: Row) -> Accelerator:
    found = find(row.gpu)
    assert found, f"{row.gpu} is not among the accelerators"
    return found


def _micro(row: Row) -> int:
    assert row.micro_batch, f"no micro-batch: {row}"
    return row.micro_batch


def _plain_seconds(row: Row) -> float:
    assert row.images_per_s, f"no rate: {row}"
    return _micro(row) / row.images_per_s
