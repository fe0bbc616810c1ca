"""Judging images."""

from __future__ import annotations

from typing import Literal

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
    every: int | None = Field(None, ge=1)
    "Steps between evaluations beside training, of checkpoints' EMA weights; the last step has one. Unset: none."
    count: int = Field(5000, ge=1)
    "Images of an evaluation beside training, made by the settings of sample and judged if there is a reference."
    grid_rows: int = Field(4, ge=1)
    "Rows of the picture that each of them keeps: the same noise and labels every time."
    actors: int = Field(1, ge=1)
    "Size of their pool, on what training leaves free."
    accelerator: Literal["same", "cpu", "gpu"] = "same"
    "Where their networks run. same: as resources.accelerator says."
    start_timeout_s: float = Field(600.0, gt=0)
    "Seconds that one of them waits for room on the cluster before it is given up."
    timeout_s: float = Field(14_400.0, gt=0)
    "Seconds after which one of them is ended as too slow."
    wait_s: float = Field(3600.0, ge=0)
    "Seconds that a finished training waits for its last one."
