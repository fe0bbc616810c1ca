"""Generating images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dico_ray.config.base import Location, Section, Timestep


class Sample(Section):
    """checkpoint -> images."""

    checkpoint: str = "last"
    "'last' or 'best' (by train.best_metric) of this run, or the folder or URL of one checkpoint."
    weights: Literal["ema", "model"] = "ema"
    "Which of the checkpoint's weights generate."
    count: int = Field(64, ge=1)
    "Number of images."
    steps: int = Field(250, ge=2, le=1000)
    "Steps of the sampler."
    method: Literal["ddpm", "ddim", "dpm++2m", "dpm++3m", "dpm++2m-sde", "unipc", "heun"] = "ddpm"
    "ADM's ancestral sampler, DDIM (eta 0), or one for few steps: DPM-Solver++, UniPC, Heun (two evaluations a step)."
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    "Classifier-free guidance u + scale (c - u); 1 is none."
    guidance_channels: Annotated[Literal["3", "all"], BeforeValidator(str)] = "3"
    "Latent channels that guidance acts on: the first three (the published FIDs) or all (diffusers)."
    guidance_interval: tuple[Timestep, Timestep] | None = None
    "Guide only between these timesteps (lowest, highest), as [lo, hi]. Unset: always."
    labels: Literal["balanced", "random"] = "balanced"
    "Label of image i: each class in turn, or a seeded uniform draw."
    classes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    "Labels to draw, as [207,360]; unset: all of the checkpoint's."
    seed: int = Field(0, ge=0, lt=2**63)
    "Image i is a function of (seed, i) alone, whatever the batch size and the pool."
    batch_size: int = Field(32, ge=1)
    "Images an actor generates at a time."
    decode_batch: int = Field(32, ge=1)
    "Latents that are decoded at a time."
    piece: int | None = Field(None, ge=1)
    "Images an actor takes, stores and, if it dies, loses at a time; the size of a shard. Unset: batch_size."
    writers: int = Field(4, ge=1)
    "Threads of an actor that compress and store images while the next ones are generated."
    precision: Literal["fp32", "bf16"] = "fp32"
    "Arithmetic of the network."
    compile: bool = False
    "Compile the network's blocks (GPUs only): about a minute to start, for thousands of images."
    cuda_graphs: bool = True
    "Capture the network's passes as CUDA graphs (GPUs only), so that GPUs do not wait for the host; outputs are equal."
    output: Location = ""
    "Folder for the images; unset: samples/ in the run's folder."
    format: Literal["png", "webdataset", "npz"] = "png"
    "A PNG file an image by class, WebDataset shards of PNGs, or one .npz as ADM's evaluator reads it."
    grid_rows: int = Field(8, ge=1)
    "Rows of the grid picture; a column per class, up to ten."

    @model_validator(mode="after")
    def _consistent(self) -> Sample:
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"sample.guidance_interval: {list(self.guidance_interval)} must be [lowest, highest]")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"sample.classes: {list(self.classes)} names a label twice; name each once")
        return self
