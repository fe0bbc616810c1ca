"""`dico-ray bench scaling`: training's rate by workers and ZeRO stage, through Ray Train workers and the engine.

Whole optimizer steps of train.global_batch images (rounded to whole micro-batches) with EMA, on random latents: what
the stream adds is another bench's. Efficiency is the rate over that of the least number of workers, each worker's for
each worker's. Memory stands beside what `dico-ray plan` foresees. DeepSpeed 0.19 never lets an engine of
stage 3 go: that stage comes last, and of several micro-batches the first one's memory alone is its own.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from json import dumps
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from dico_ray import cluster
from dico_ray.bench import network as ways
from dico_ray.bench.train import measure_engine
from dico_ray.config import Config, ConfigError
from dico_ray.planning.memory import memory_at
from dico_ray.settings import build, merge
from dico_ray.storage import Storage

_STAGES = (0, 1, 2, 3)
_LOOK_S = 0.5
_TIMEOUT_S = 300  # of a collective: a worker without memory leaves the others waiting


def main(
    config: Config, *, verbose: bool, workers: list[int], stages: list[int], micro_batches: list[int], steps: int,
    json: str,
) -> None:  # fmt: skip
    """Prints the table and stores the rows.

    workers: numbers of workers; all of one number run before the next. stages: of ZeRO. micro_batches: each is
    measured. steps: optimizer steps that each is timed for. json: a file for the figures. Raises ConfigError for what
    cannot run on the cluster.
    """
    if min(workers) < 1 or min(micro_batches) < 1 or steps < 1 or not set(stages) <= set(_STAGES):
        raise ConfigError(
            f"--workers {workers} --stages {stages} --micro_batches {micro_batches} --steps {steps}: stages are 0 to "
            "3, the others 1 or more"
        )
    cluster.connect(verbose)
    gpu = cluster.uses_gpu(config.resources)
    most = max(workers)
    cluster.require(
        most * config.resources.worker_cpus, most if gpu else 0, f"--workers {most}", "it, or resources.worker_cpus"
    )
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for size in sorted(set(workers)):
        for found in _run(config, size, stages, micro_batches, steps, gpu):
            rows.append(found)
            found["efficiency"] = efficiency(found, rows)
            print(line(found), flush=True)
            if json:  # as they come: large networks take minutes
                folder, base = os.path.split(os.path.abspath(json))
                Storage(folder).write(base, dumps(_figures(rows), indent=1).encode())
    print("\n" + ways.class_table([{**row, "variant": f"{row['workers']}x ZeRO-{row['stage']}"} for row in rows]))


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if "failed" not in row]
    names = {row["gpu"] for row in done} - {""}
    measured = [
        {**one, "gpus": row["workers"]}
        for name in names for row in done for one in ways.measured(0, [row], name)
    ]  # fmt: skip
    machine = ", ".join(names) or f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {"machine": machine, "rows": rows, "measured": measured}


def efficiency(found: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """A row's rate per worker over that of the fewest workers at its stage and micro-batch; None if it failed."""
    alike = [
        row for row in rows
        if "failed" not in row and all(row[key] == found[key] for key in ("stage", "micro_batch", "model"))
    ] if "failed" not in found else []  # fmt: skip
    if not alike:
        return None
    return found["images_per_s"] / min(alike, key=lambda row: row["workers"])["images_per_s"]


HEADER = (f"{'workers':>8}{'ZeRO':>6}{'batch':>7}{'images/s':>10}{'a worker':>10}{'efficiency':>12}{'TFLOP/s':>9}"
          f"{'GB':>7}{'foreseen':>10}{'first s':>9}")  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of the table under HEADER; TFLOP/s and GB are a worker's."""
    cells = (("total_images_per_s", 10, ".1f"), ("images_per_s", 10, ".1f"), ("efficiency", 12, ".1%"),
             ("tflops", 9, ".2f"), ("memory_gb", 7, ".1f"), ("foreseen_gb", 10, ".1f"),
             ("first_s", 9, ".1f"))  # fmt: skip
    return ways.told(f"{found['workers']:>8}{found['stage']:>6}{found['micro_batch']:>7}", found, cells)


def _run(
    config: Config, size: int, stages: list[int], batches: list[int], steps: int, gpu: bool
) -> Iterator[dict[str, Any]]:
    """The rows of one number of workers, each when it is there. Raises what ended the workers, if that came first."""
    rows: Any = ray.remote(_Rows).options(num_cpus=0).remote()
    task = {"config": config.model_dump(), "stages": stages, "batches": batches, "steps": steps, "rows": rows}
    bundle = cluster.worker_bundle(config.resources, gpu)
    with tempfile.TemporaryDirectory(prefix="dico-ray-bench-") as folder:
        trainer = TorchTrainer(
            _worker,
            train_loop_config=task,
            scaling_config=ScalingConfig(num_workers=size, use_gpu=gpu, resources_per_worker=bundle),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_TIMEOUT_S),
            run_config=RunConfig(name="scaling", storage_path=folder),
        )
        with ThreadPoolExecutor(1) as thread:
            done, told = thread.submit(trainer.fit), []
            while True:
                over = done.done()
                found = ray.get(rows.since.remote(len(told)))
                yield from found
                told += found
                if over:
                    break
                time.sleep(_LOOK_S)
            try:
                done.result()
            except ray.train.TrainingFailedError:
                if not any("failed" in row for row in told):
                    raise
                print(f"{'':8}{size} workers end there: the rows after it are left out", flush=True)


class _Rows:
    """What the first worker found, or where any was out of memory."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        if row not in self._rows:  # several workers may fail at once
            self._rows.append(row)

    def since(self, told: int) -> list[dict[str, Any]]:
        return self._rows[told:]


def _worker(task: dict[str, Any]) -> None:
    """On each worker: every stage and micro-batch, one after the other."""
    config, device = build(task["config"]), get_device()
    assert isinstance(device, torch.device)
    size = dist.get_world_size()
    if device.type == "cpu":
        torch.set_num_threads(config.resources.threads or max(1, int(config.resources.worker_cpus)))
    for stage in sorted(task["stages"]):
        for batch in task["batches"]:
            settings = build(merge(config.model_dump(), {"train": {"zero_stage": stage}}))
            ways.begin(device)
            about = {"workers": size, "stage": stage, "micro_batch": batch, "model": config.model.name}
            try:
                found = measure_engine(settings, device, batch, _timer(task["steps"]), None)
                foreseen = memory_at(settings, stage, size, batch) / 1e9
                name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
                total = found["images_per_s"] * size
                row = {**found, **about, "total_images_per_s": total, "foreseen_gb": foreseen, "gpu": name}
            except torch.OutOfMemoryError:
                ray.get(task["rows"].add.remote({**about, "failed": "out of memory"}))
                if size > 1:  # the others wait in a collective
                    raise
                continue
            if dist.get_rank() == 0:
                ray.get(task["rows"].add.remote(row))


def _timer(steps: int) -> Callable[[Callable[[], Any], torch.device], float]:
    """Mean seconds of a call over so many, the slowest worker's: every worker makes the same number of calls."""

    def timed(call: Callable[[], Any], device: torch.device) -> float:
        ways.synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            call()
        ways.synchronize(device)
        took = torch.tensor((time.perf_counter() - began) / steps, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took)

    return timed
