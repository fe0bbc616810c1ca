"""The figures: read as they stand, and of what they say they are."""

from __future__ import annotations

import pytest

from dico_ray import measured
from dico_ray.accelerators import find
from dico_ray.arithmetic import training_flops
from dico_ray.config import ARCHITECTURES, Model

OTHERS = ("Stable Diffusion's autoencoder", "FID's Inception")


def test_rows_are_of_known_networks_and_gpus() -> None:
    rows = measured.rows()
    assert {measured.WHOLE, measured.BARE, measured.WHOLE_STAGE_3, measured.CHECKPOINT} <= {row.what for row in rows}
    assert len({(row.model, row.gpu, row.what, row.micro_batch, row.gpus) for row in rows}) == len(rows)
    for row in rows:
        assert row.model in ARCHITECTURES or row.model in OTHERS or row.model.startswith("DiT"), row
        gpu = find(row.gpu)
        assert gpu, row
        assert (row.memory_gb or 0) * 1e9 < gpu.memory, row


@pytest.mark.parametrize("what", [measured.WHOLE, measured.BARE])
def test_rates_and_arithmetic_agree(what: str) -> None:
    """A row's TFLOP/s are its images/s by the network's arithmetic."""
    rows = [row for row in measured.rows() if row.what == what and row.tflops and row.images_per_s]
    assert rows
    for row in rows:
        flops = training_flops(Model(name=row.model))  # pyright: ignore[reportCallIssue]
        assert row.images_per_s
        assert row.images_per_s * flops / 1e12 == pytest.approx(row.tflops, rel=0.01)


def test_rows_of_a_bench_are_read_as_they_are_written() -> None:
    written = {
        "model": "DiCo-S", "gpu": "NVIDIA H100 80GB HBM3", "what": "training, ours", "micro_batch": 8,
        "images_per_s": 1.0, "tflops": 1.0, "memory_gb": 1.0, "versions": {"torch": "2.14.1", "python": "3.12.1"},
        "command": "dico-ray bench train", "date": "2026-11-25",
    }  # fmt: skip
    row = measured.read(written)
    assert (row.gpu, row.versions, row.gpus) == ("H100", "torch 2.14.1, python 3.12.1", 1)
    assert hash(row)
