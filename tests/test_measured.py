"""The figures: read as they stand, and of what they say they are."""

from __future__ import annotations

import pytest

from dico_ray import measured
from dico_ray.accelerators import find
from dico_ray.arithmetic import training_flops
from dico_ray.config import ARCHITECTURES, Model


def test_rows_are_of_known_networks_and_gpus() -> None:
    rows = measured.rows()
    assert {measured.WHOLE, measured.BARE, measured.WHOLE_STAGE_3, measured.CHECKPOINT} <= {row.what for row in rows}
    assert len({(row.model, row.gpu, row.what, row.micro_batch, row.gpus) for row in rows}) == len(rows)
    for row in rows:
        assert row.model in ARCHITECTURES or row.model.startswith("DiT"), row
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
