"""Judging images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dico_ray.config.base import Location, Section, absolute, absolute_if_local


def _network(where: str) -> str:
    kind, _, which = where.partition(":")
    if kind == "dinov2":
        return f"{kind}:{absolute_if_local(which)}" if which else kind
    return where if where == "inception" else absolute(where)


class Evaluate(Section):
    """images -> FID, sFID, inception score, precision and recall."""

    images: Location = ""
    "Folder, WebDataset, Parquet or ADM's .npz to judge; unset: the run's samples, else what sample.checkpoint draws."
    reference: Location = ""
    "Real images of the same kinds, or ADM's .npz of statistics (mu, sigma, mu_s, sigma_s) and images (arr_0)."
    features: Annotated[str, AfterValidator(_network)] = "inception"
    "Network: inception (fetched once), its weights (.pth path or URL), a classifier (.safetensors), or dinov2[:MODEL]."
    judge: Location = ""
    "A second classifier (.safetensors) that tells how often an image is read as its class; unset: no such rate."
    batch_size: int = Field(64, ge=1)
    "Images an actor judges at a time."
    range_size: int = Field(256, ge=1)
    "Images an actor takes from the queue at a time; each range is kept until all are done, for a restart."
    image_size: int | None = Field(None, ge=8)
    "Images and reference are centre-cropped and scaled to this size (ADM's way). Unset: as they are."
    precision: Literal["fp32", "tf32", "fp16"] = "fp32"
    "Arithmetic of the feature network's convolutions on GPUs; fp16 has TF32's digits at half the bytes."
    compile: bool = False
    "Compile the feature network (GPUs only): about a minute to start, for tens of thousands of images."
    split_size: int = Field(5000, ge=1)
    "Images of a split of the inception score, taken in their order."
    neighbours: int = Field(3, ge=1)
    "Nearest neighbours that set the radius of precision and recall."
    reference_features: int = Field(10_000, ge=2)
    "At most so many reference images, evenly spaced, count for precision and recall."
    cache: Location = ""
    "Folder of reference statistics, kept by their images' content; unset: reference-statistics/ beside the runs."
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
