"""What GPUs can do by their makers' data sheets: what MFU is measured against, and what plans rest on. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One GPU.

    name: its words are those of the name that the driver tells, in any order, with others between them.
    peak_flops: dense bf16 matrix products, FLOP/s. bandwidth: of its memory, bytes/s.
    memory: bytes that PyTorch finds (a little less than on the box).
    link: bytes/s one way to the other GPUs of its node: NVLink, or PCIe where there is none.
    """

    name: str
    peak_flops: float
    memory: float
    bandwidth: float
    link: float


#               name         FLOP/s    memory   bandwidth   link
_ROWS = (
    Accelerator("B200",      2250e12, 191.5e9,    7.70e12, 900e9),
    Accelerator("H200",       989e12, 150.1e9,    4.80e12, 450e9),
    Accelerator("H100",       989e12,  85.0e9,    3.35e12, 450e9),
    Accelerator("H100 NVL",   835e12, 100.0e9,    3.90e12, 300e9),
    Accelerator("H100 PCIe",  756e12,  85.0e9,    2.00e12,  64e9),
    Accelerator("H800",       989e12,  85.0e9,    3.35e12, 200e9),
    Accelerator("A100",       312e12,  85.0e9,    2.04e12, 300e9),
    Accelerator("A100 40GB",  312e12,  42.3e9,    1.56e12, 300e9),
    Accelerator("A800",       312e12,  85.0e9,    2.04e12, 200e9),
    Accelerator("L40S",       362e12,  47.7e9,    0.86e12,  32e9),
    Accelerator("L4",         121e12,  23.7e9,    0.30e12,  32e9),
)  # fmt: skip
ACCELERATORS = {row.name: row for row in _ROWS}


def find(name: str) -> Accelerator | None:
    """The row for a GPU by the name that its driver tells ("NVIDIA H100 80GB HBM3") or its own; None if there is none.

    Of several rows the one with most words in the name.
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    known = [row for row in _ROWS if set(row.name.upper().split()) <= words]
    return max(known, key=lambda row: len(row.name.split()), default=None)
