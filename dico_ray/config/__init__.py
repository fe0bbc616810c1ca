"""Every setting of dico-ray: typed, validated, with one home for each default; a module a group of sections.

The head node of a cluster validates a run with this package alone: it imports neither torch nor Ray.
"""

from __future__ import annotations

import yaml
from pydantic import Field, model_validator

from dico_ray.config.base import ConfigError, Location, LocationOrHubId, Section, UserError
from dico_ray.config.cluster import Cluster
from dico_ray.config.data import Codec, Data, Encode
from dico_ray.config.evaluation import Evaluate
from dico_ray.config.hardware import Hardware
from dico_ray.config.model import ARCHITECTURES, Architecture, Model
from dico_ray.config.run import Resources, Run, StorageSettings
from dico_ray.config.sampling import Sample
from dico_ray.config.sweep import SCALE, Sweep
from dico_ray.config.train import WIDEST_PROFILE, Train, is_profile_name

__all__ = [
    "ARCHITECTURES", "SCALE", "WIDEST_PROFILE", "Architecture", "Cluster", "Codec", "Config", "ConfigError", "Data",
    "Encode", "Evaluate", "Hardware", "Location", "LocationOrHubId", "Model", "Resources", "Run", "Sample", "Section",
    "StorageSettings", "Sweep", "Train", "UserError", "is_profile_name",
]  # fmt: skip


class Config(Section):
    """The whole of a run's settings."""

    recipe: str = ""
    "Name of the recipe that the settings started from."
    run: Run = Field(default_factory=lambda: Run.model_validate({}))
    storage: StorageSettings = Field(default_factory=lambda: StorageSettings.model_validate({}))
    model: Model = Field(default_factory=lambda: Model.model_validate({}))
    codec: Codec = Field(default_factory=lambda: Codec.model_validate({}))
    data: Data = Field(default_factory=lambda: Data.model_validate({}))
    encode: Encode = Field(default_factory=lambda: Encode.model_validate({}))
    train: Train = Field(default_factory=lambda: Train.model_validate({}))
    sample: Sample = Field(default_factory=lambda: Sample.model_validate({}))
    evaluate: Evaluate = Field(default_factory=lambda: Evaluate.model_validate({}))
    sweep: Sweep = Field(default_factory=lambda: Sweep.model_validate({}))
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))
    hardware: Hardware = Field(default_factory=lambda: Hardware.model_validate({}))
    cluster: Cluster = Field(default_factory=lambda: Cluster.model_validate({}))

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        train = self.train
        low, high = train.worker_range
        if low > high:
            raise ValueError(f"train.num_workers: [{low}, {high}] must be [least, most]")
        if not train.world_sizes:
            between = f"{low}" if low == high else f"any number from {low} to {high}"
            raise ValueError(
                f"train.global_batch: {train.global_batch} does not divide among train.num_workers = {between}; "
                f"take a multiple, or {_divisor_hint(train.global_batch)} workers"
            )
        share = train.global_batch // train.world_sizes[0]
        if low == high and train.micro_batch and share % train.micro_batch:
            raise ValueError(
                f"train.micro_batch: {train.micro_batch} does not divide a worker's {share} samples of a step "
                f"(train.global_batch / train.num_workers); take {_divisor_hint(share)}"
            )
        if train.offload and train.zero_stage == 0:
            raise ValueError("train.offload: true needs a sharded optimizer; take train.zero_stage 1, 2 or 3")
        if train.validate_every and not self.data.validation:
            raise ValueError(
                f"train.validate_every: {train.validate_every} needs held-out latents; set data.validation"
            )
        every = self.evaluate.every
        self._best_can_be_told()
        if every and every % train.checkpoint_every:
            raise ValueError(
                f"evaluate.every: {every} is no multiple of train.checkpoint_every = {train.checkpoint_every}, "
                "and only checkpoints are evaluated; change one of them"
            )
        if self.resources.worker_gpus < 1 and train.worker_range[-1] > 1:
            raise ValueError(
                f"resources.worker_gpus: {self.resources.worker_gpus:g} would have two of train.num_workers = "
                f"{train.worker_range[-1]} workers share a GPU, which NCCL refuses; take 1, or train.num_workers 1"
            )
        if train.warmup_steps >= train.steps:
            raise ValueError(f"train.warmup_steps: {train.warmup_steps} must be less than train.steps = {train.steps}")
        return self

    def _best_can_be_told(self) -> None:
        """Raises ValueError if train.keep_best could keep nothing, since no checkpoint comes with the metric."""
        train, name = self.train, self.train.best_metric
        if not train.keep_best:
            return
        if name.startswith("val_"):
            if not train.validate_every or train.checkpoint_every % train.validate_every:
                raise ValueError(
                    f"train.best_metric: {name} is known at no checkpoint unless train.validate_every divides "
                    f"train.checkpoint_every = {train.checkpoint_every}"
                )
        elif name not in ("loss", "mse", "vb", "grad_norm") and not self.evaluate.every:
            raise ValueError(f"train.best_metric: training logs no {name}; set evaluate.every, or take loss")

    def to_yaml(self) -> str:
        """The resolved settings, as a file that `--config` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _divisor_hint(number: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, divisors[:-1])) + (" or " if len(divisors) > 1 else "") + str(divisors[-1])
