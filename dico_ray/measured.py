"""Measured figures, as data: `measured.json`, a row for each thing that was run. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dico_ray.accelerators import find

# What was run, where plans build on it: a row's `what`.
WHOLE = "training, whole path"
BARE = "training, bare loop, blocks compiled"
PRODUCTS = "training, the blocks' 1x1 products alone"
WHOLE_FUSED = "training, whole path, blocks fused, CUDA graphs"
ENGINE_FUSED = "training, engine at ZeRO-1 with EMA, Triton (fused blocks), CUDA graphs"
BY_STAGE = {  # of one run, `bench scaling`'s
    1: "training, engine at ZeRO-1 with EMA, Triton (fused blocks), CUDA graphs, by bench scaling",
    2: "training, engine at ZeRO-2 with EMA, Triton (fused blocks), CUDA graphs, by bench scaling",
    3: "training, engine at ZeRO-3 with EMA, Triton (fused blocks)",
}
WHOLE_STAGE_3 = "training, whole path, ZeRO-3"
CHECKPOINT = "checkpoint behind training"


@dataclass(frozen=True)
class Row:
    """A measurement. images_per_s and tflops are per GPU, memory_gb is what tensors took of a GPU at most.

    what: training by one of the ways named above, or anything else, in words. versions and command: "" where the
    source does not tell. values: other figures, by name (seconds, GB ...).
    """

    model: str
    gpu: str
    what: str
    micro_batch: int | None
    images_per_s: float | None
    tflops: float | None
    memory_gb: float | None
    versions: str
    command: str
    date: str
    gpus: int = 1
    values: tuple[tuple[str, float], ...] = ()

    def told(self) -> str:
        """The row in a few words, for the foot of a table."""
        several = f"{self.gpus} x " if self.gpus > 1 else ""
        where = f"{several}{self.gpu}, micro-batch {self.micro_batch}"
        return f"{self.model}, {self.what}, {where}: {self.images_per_s:g} images/s"


@cache
def rows() -> tuple[Row, ...]:
    """All rows, in the file's order."""
    return tuple(map(read, json.loads(files("dico_ray").joinpath("measured.json").read_text(encoding="utf-8"))))


def read(row: dict[str, Any]) -> Row:
    """A row of the file, or one of a bench's --json: it names the GPU as the driver does, and versions one by one."""
    gpu, versions = find(row["gpu"]), row["versions"]
    if isinstance(versions, dict):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    values = tuple(row.get("values", {}).items())
    return Row(**{**row, "gpu": gpu.name if gpu else row["gpu"], "versions": versions, "values": values})
