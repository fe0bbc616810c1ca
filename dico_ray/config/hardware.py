"""The machines that a run is planned for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dico_ray.config.base import Section


class Hardware(Section):
    """What `dico-ray plan` reckons with, beside cluster.gpus_per_node; a run itself takes the GPUs that it finds."""

    gpu: str = "H100"
    "The GPU: B200, H200, H100, H100 NVL, H100 PCIe, H800, A100, A100 40GB, A800, L40S or L4."
    memory_gb: float | None = Field(None, gt=0)
    "Memory of a GPU. Unset: by the data sheet."
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    "Share of it that training's tensors may take; the rest is CUDA's, NCCL's, and lost between tensors."
    link_gb_s: float | None = Field(None, gt=0)
    "GB/s one way between a GPU and the others of its node. Unset: by the data sheet."
    network_gbit_s: float = Field(400.0, gt=0)
    "Gbit/s of a node's network to other nodes, for each of its GPUs."
    link_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    "Share of links and network that collectives reach."
    latency_us: float = Field(20.0, ge=0)
    "Microseconds that each hop of a collective takes, however little it moves."
    price: float | None = Field(None, ge=0)
    "Price of a GPU's hour, in any currency. Unset: hours alone are told."
