"""Images, autoencoder and latent shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dico_ray.config.base import Location, LocationOrHubId, Section


class Codec(Section):
    """The autoencoder between pixels and latents."""

    vae: LocationOrHubId = "stabilityai/sd-vae-ft-ema"
    "A diffusers AutoencoderKL: a local folder or a hub id."
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    "Arithmetic of encoding and decoding. fp16 is finer than bf16; what is too large for it is an error."
    compile: bool = False
    "Compile the autoencoder (GPUs only): a minute or so to start, for thousands of images."


class Data(Section):
    """The latent shards that training reads, and how their order is shuffled."""

    latents: Location = "latents"
    "Folder or URL of the latent shards (the one with manifest.json): written by encode, read by train."
    window_samples: int = Field(16384, ge=1)
    "Samples shuffled one by one at a time; rounded up to whole global batches. More: better mixing, more memory."
    read_tasks: int = Field(2, ge=1)
    "Windows that are read at the same time, ahead of training."
    cache: Location = ""
    "Folder on each node (RAM or NVMe) that keeps chunks for later epochs, checked by hash. Unset: no cache."
    cache_gb: float = Field(20.0, gt=0)
    "Size of a node's cache; the chunks used longest ago make room."
    validation: Location = ""
    "Folder or URL of held-out latent shards, for train.validate_every: encoded by the same codec.vae."
    validation_samples: int = Field(2048, ge=1)
    "Samples of a validation, spread evenly over that set; all of a smaller one."


class Encode(Section):
    """images -> latent shards."""

    images: Location = ""
    "Folder of images by class (sorted names give labels 0, 1, ...), of WebDataset .tar files, or of .parquet files."
    image_size: int = Field(256, ge=8)
    "Images are centre-cropped and scaled to this height and width (ADM's way)."
    batch_size: int = Field(32, ge=1)
    "Images an actor encodes at a time (each gives two latents: plain and mirrored)."
    shard_samples: int = Field(4096, ge=1)
    "Samples of a shard."
    chunk_bytes: int = Field(4 * 2**20, ge=4096)
    "Size of the unit that is read, checked by hash and shuffled as one: about one range request."
    max_skipped: int | None = Field(None, ge=0)
    "Images that may be unreadable before encoding stops. Unset: any number; all are named in the manifest."
    store: Literal["sample", "mean", "moments"] = "sample"
    "One draw of the autoencoder's posterior (as the released features), its mean, or mean and log variance."
