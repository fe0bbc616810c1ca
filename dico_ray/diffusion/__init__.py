"""The diffusion process: noising, loss, sampling and random draws. Networks come in as arguments."""

from __future__ import annotations

from dico_ray.diffusion.noise import Stream
from dico_ray.diffusion.process import Diffusion
from dico_ray.diffusion.sampler import Guidance, Sampler, guided_output
from dico_ray.diffusion.solvers import Solver, make_sampler

__all__ = ["Diffusion", "Guidance", "Sampler", "Solver", "Stream", "guided_output", "make_sampler"]
