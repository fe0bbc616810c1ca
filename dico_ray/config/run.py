"""Where a run lives, how object stores are reached, what it may take of the cluster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dico_ray.config.base import Location, Section


class Run(Section):
    """Where a run lives, and the seed that everything in it follows from."""

    name: str = Field("dico", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    "Name of the run. The same storage and name again: the run continues where it stood."
    storage: Location = "runs"
    "Folder or object-store URL that holds runs; this run's files are in STORAGE/NAME."
    seed: int = Field(0, ge=0, lt=2**63)
    "Seed of sample order, timesteps, noise, label drops, initial weights. With it a run is repeatable."
    track: tuple[Literal["wandb", "mlflow"], ...] = ()
    "Services that get the training metrics too, as [wandb,mlflow]; their own environment variables say where."

    @property
    def folder(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"


class StorageSettings(Section):
    """How object stores are reached (local folders need none of it)."""

    library: Literal["fsspec", "pyarrow"] = "fsspec"
    "What reads and writes s3:// and gs://: fsspec's packages (s3fs, gcsfs) or pyarrow.fs. s3fs reads shards fastest."
    endpoint: str = ""
    "URL of the store's server; unset: AWS_ENDPOINT_URL, or the provider's own."
    anonymous: bool = False
    "Ask without credentials (public buckets)."
    options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    "The library's own options, as {key: ..., secret: ...}; never written to config.yaml. Unset: environment variables."
    retry_s: float = Field(120.0, ge=0)
    "Seconds for which a failing request is tried again, with growing pauses."
    timeout_s: float = Field(30.0, gt=0)
    "Seconds after which a request without an answer has failed."


class Resources(Section):
    """What a run may take from the Ray cluster."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    "Where networks run. auto: on GPUs if the cluster has any."
    worker_cpus: float = Field(1.0, gt=0)
    "CPUs that Ray reserves for each training worker."
    worker_gpus: float = Field(1.0, gt=0, le=1)
    "Share of a GPU for each training worker: below 1, trials of a sweep share GPUs. Needs train.num_workers 1 then."
    actors: int = Field(1, ge=1)
    "Size of the pool that encodes, samples or evaluates."
    actor_cpus: float = Field(1.0, gt=0)
    "CPUs that Ray reserves for each actor of the pool. From 2 on `evaluate` decodes files by a process for each 2."
    actor_gpus: float = Field(1.0, gt=0, le=1)
    "GPUs, or the share of one, that Ray reserves for each actor of the pool where networks run on GPUs."
    threads: int | None = Field(None, ge=1)
    "Arithmetic threads of a CPU worker or actor. Unset: as many as its CPUs."
