"""DiCo, the diffusion ConvNet of arXiv 2505.11196."""

from __future__ import annotations

from dico_ray.models.dico import DiCo, create_model

__all__ = ["DiCo", "create_model"]
