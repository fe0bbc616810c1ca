from __future__ import annotations

import pytest

from dico_ray.accelerators import ACCELERATORS, find
from dico_ray.config.hardware import Hardware


@pytest.mark.parametrize(
    ("told", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"),
        ("NVIDIA H800", "H800"), ("h100", "H100"),
    ],
)  # fmt: skip
def test_drivers_names_find_their_row(told: str, row: str) -> None:
    found = find(told)
    assert found
    assert found.name == row


@pytest.mark.parametrize("told", ["NVIDIA GeForce RTX 4090", "NVIDIA T4", "", "NVIDIA GH100X"])
def test_others_find_none(told: str) -> None:
    assert find(told) is None


def test_the_help_of_hardware_gpu_names_every_row() -> None:
    from dico_ray.settings import fields

    text = next(field.doc for field in fields("hardware") if field.path == "hardware.gpu")
    assert all(name in text for name in ACCELERATORS)
    assert Hardware.model_validate({}).gpu in ACCELERATORS
