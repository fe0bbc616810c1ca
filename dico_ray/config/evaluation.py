"""Judging images."""

from __future__ import annotations

from pydantic import Field

from dico_ray.config.base import Location, Section


class Evaluate(Section):
    """images -> Frechet distance to a reference."""

    images: Location = ""
    "Folder of images to judge, with one subfolder per class; unset: the run's samples."
    reference: Location = ""
    "Folder of real images, with one subfolder per class."
    features: Location = ""
    "The feature network: a classifier's .safetensors file."
    judge: Location = ""
    "A second classifier (.safetensors) that tells how often an image is read as its class; unset: no such rate."
    batch_size: int = Field(64, ge=1)
    "Images an actor judges at a time."
    output: Location = ""
    "File for the result; unset: evaluation.json in the run's folder."
