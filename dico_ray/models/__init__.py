"""DiCo, the diffusion ConvNet of arXiv 2505.11196."""

from __future__ import annotations

from dico_ray.models.dico import (
    UNITS,
    DiCo,
    compile_blocks,
    create_model,
    graph_inference,
    graph_stages,
    use_kernels,
)

__all__ = ["UNITS", "DiCo", "compile_blocks", "create_model", "graph_inference", "graph_stages", "use_kernels"]
