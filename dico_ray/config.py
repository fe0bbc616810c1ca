"""Every setting of dico-ray: typed, validated, with one home for each default.

The head node of a cluster validates a run with this module alone: it imports neither torch nor Ray.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class UserError(Exception):
    """A failure that its own message explains in full: the command line prints that line and nothing else."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot work. The message is one line: the value, the rule, the setting to change."""


@dataclass(frozen=True)
class Architecture:
    """One size of the DiCo family (arXiv 2505.11196, table of model configurations)."""

    hidden_size: int
    depths: tuple[int, int, int, int, int]
    ffn_ratio: int


ARCHITECTURES: dict[str, Architecture] = {
    "DiCo-S":    Architecture(128, (5, 4, 4, 4, 4), 2),
    "DiCo-B":    Architecture(256, (5, 4, 4, 4, 4), 2),
    "DiCo-L":    Architecture(352, (9, 8, 9, 8, 9), 2),
    "DiCo-XL":   Architecture(416, (9, 9, 10, 9, 9), 2),
    "DiCo-H":    Architecture(416, (14, 12, 10, 12, 14), 4),
    "DiCo-tiny": Architecture(48, (2, 2, 2, 2, 2), 2),
}  # fmt: skip

Depths = tuple[int, int, int, int, int]


def _absolute(location: str) -> str:
    """A local path made absolute, since Ray's workers run in other folders; URLs and '' stay."""
    return location if not location or "://" in location else os.path.abspath(os.path.expanduser(location))


def _absolute_if_local(location: str) -> str:
    """The same for what may also be a hub id, such as owner/name."""
    return _absolute(location) if location.startswith((".", "/", "~")) or os.path.isdir(location) else location


Location = Annotated[str, AfterValidator(_absolute)]
LocationOrHubId = Annotated[str, AfterValidator(_absolute_if_local)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Timestep = Annotated[int, Field(ge=0, le=999)]
PositiveInt = Annotated[int, Field(ge=1)]
WIDEST_PROFILE = 0.28  # sigma_rel ends at 1 / sqrt(12), where the profile is flat (arXiv 2312.02696)
ProfileWidth = Annotated[float, Field(gt=0, lt=WIDEST_PROFILE)]


def is_profile_name(width: float) -> bool:
    """Whether three decimals tell a profile's relative width: it is kept under that name."""
    return width == round(width, 3)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
    "What reads and writes s3:// and gs://: fsspec's packages (s3fs, gcsfs) or pyarrow.fs."
    endpoint: str = ""
    "URL of the store's server; unset: AWS_ENDPOINT_URL, or the provider's own."
    anonymous: bool = False
    "Ask without credentials (public buckets)."
    options: dict[str, Any] = Field(default_factory=dict, exclude=True)
    "The library's own options, as {key: ..., secret: ...}; never written to config.yaml. Unset: environment variables."
    retry_s: float = Field(120.0, ge=0)
    "Seconds for which a failing request is tried again, with growing pauses."
    timeout_s: float = Field(30.0, gt=0)
    "Seconds after which a request without an answer has failed."


class Model(Section):
    """The network: a row of the DiCo family, or sizes of your own."""

    name: str = "DiCo-S"
    "Row of the family: DiCo-S, DiCo-B, DiCo-L, DiCo-XL, DiCo-H or DiCo-tiny."
    hidden_size: int | None = Field(None, ge=4)
    "Width of the first stage, instead of the row's (an even number)."
    depths: Depths | None = None
    "Blocks of the five stages, instead of the row's."
    ffn_ratio: int | None = Field(None, ge=1)
    "Width of the feed-forward half over the stage's width, instead of the row's."
    num_classes: int = Field(1000, ge=1)
    "Number of classes; the label num_classes itself is the null label of guidance."
    in_channels: int = Field(4, ge=1)
    "Channels of a latent."
    latent_size: int = Field(32, ge=4, multiple_of=4)
    "Height and width of a latent (image size over the autoencoder's factor); a multiple of 4."

    @model_validator(mode="after")
    def _known(self) -> Model:
        if self.name not in ARCHITECTURES:
            raise ValueError(f"model.name: {self.name!r} is unknown; take one of {', '.join(ARCHITECTURES)}")
        if self.architecture.hidden_size % 2:
            raise ValueError(f"model.hidden_size: {self.hidden_size} is odd; take an even number")
        if min(self.architecture.depths) < 1:
            raise ValueError(f"model.depths: {self.depths}: every stage needs at least one block")
        return self

    @property
    def architecture(self) -> Architecture:
        """The named row with this config's own sizes in place of the row's."""
        row = ARCHITECTURES[self.name]
        return Architecture(
            self.hidden_size or row.hidden_size,
            self.depths or row.depths,
            self.ffn_ratio or row.ffn_ratio,
        )


class Codec(Section):
    """The autoencoder between pixels and latents."""

    vae: LocationOrHubId = "stabilityai/sd-vae-ft-ema"
    "A diffusers AutoencoderKL: a local folder or a hub id."
    precision: Literal["fp32", "bf16"] = "fp32"
    "Arithmetic of encoding and decoding."


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


class Train(Section):
    """latent shards -> checkpoints with EMA weights."""

    steps: int = Field(400_000, ge=1)
    "Optimizer steps of the whole run."
    global_batch: int = Field(256, ge=1)
    "Samples of one optimizer step, over all workers."
    micro_batch: int | None = Field(None, ge=1)
    "Most samples of one forward pass on one worker; gradients accumulate to the global batch. Unset: no accumulation."
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    "Training workers (one GPU each, where there are GPUs), or [min,max]: as many as the cluster has room for."
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    "Learning rate of AdamW, constant after the warm-up."
    warmup_steps: int = Field(0, ge=0)
    "Steps over which the learning rate rises linearly from zero."
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    "AdamW's decay of first and second moments."
    weight_decay: float = Field(0.0, ge=0)
    "AdamW's decoupled weight decay."
    grad_clip: float = Field(0.0, ge=0)
    "Gradients with a larger norm are scaled down to it; 0 leaves them alone."
    label_drop: Probability = 0.1
    "Share of samples trained with the null label, for classifier-free guidance."
    flip: bool = True
    "Mirror every second sample (by a seeded coin), from the mirrored image's own latent."
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    "Decay of the exponential moving average of the weights, kept in fp32."
    ema_profiles: tuple[ProfileWidth, ...] = ()
    "Relative widths of more averages, with EDM2's power-function profile, as [0.05,0.1]; each takes an EMA's memory."
    ema_snapshot_every: int | None = Field(None, ge=1)
    "Steps between snapshots of those averages, kept for `dico-ray ema`; the last step has one. Unset: none."
    precision: Literal["fp32", "bf16"] = "bf16"
    "Arithmetic of the network; master weights, optimizer and EMA are fp32 in either."
    compile: bool = True
    "Compile the network's blocks where training runs on GPUs, once for each width (not at ZeRO stage 3)."
    zero_stage: int = Field(1, ge=0, le=3)
    "DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights are sharded over the workers."
    offload: bool = False
    "Keep the fp32 weights, moments and EMA in the hosts' memory and step there (ZeRO-Offload; stages 1 to 3)."
    checkpoint_every: int = Field(10_000, ge=1)
    "Steps between checkpoints; the last step always has one."
    keep_checkpoints: int = Field(2, ge=1)
    "The newest committed checkpoints that stay; older ones are removed, but for those of the next two settings."
    keep_every: int | None = Field(None, ge=1)
    "Checkpoints of steps divisible by this stay for ever."
    keep_best: int = Field(0, ge=0)
    "So many checkpoints with the smallest train.best_metric stay."
    best_metric: str = "loss"
    "Logged metric by which checkpoints are compared."
    max_failed_saves: int = Field(3, ge=0)
    "Checkpoints in a row that may fail to be written before the run stops (each is tried for storage.retry_s)."
    max_skipped_steps: int = Field(5, ge=1)
    "Steps in a row with gradients that are not finite (they are skipped) before the run goes back to its checkpoint."
    hang_timeout_s: float = Field(1800.0, gt=0)
    "Seconds without a finished step after which a worker writes its stacks to hangs/ in the run's folder and restarts."
    log_every: int = Field(100, ge=1)
    "Steps between logged metrics (the logged loss is the mean over these steps)."
    max_failures: int = Field(3, ge=0)
    "Worker failures after which Ray Train gives up; each restart continues at the last checkpoint."
    start_timeout_s: float = Field(600.0, gt=0)
    "Seconds to wait for room for the workers on the cluster (an autoscaler may be adding nodes)."
    grow_every_s: float = Field(60.0, gt=0)
    "Seconds between looks for room for more workers, if num_workers allows more: they join after a checkpoint."
    data_timeout_s: float = Field(300.0, gt=0)
    "Seconds without a batch after which training stops and says why, instead of waiting for ever."

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that the settings allow and among which the global batch divides, largest first."""
        low, high = self.worker_range
        return [size for size in range(high, low - 1, -1) if self.global_batch % size == 0]

    def micro_batch_on(self, world_size: int) -> int:
        """Samples of one forward pass when so many workers train: the most that divide a worker's share."""
        share = self.global_batch // world_size
        most = self.micro_batch or self.global_batch // self.world_sizes[0]
        return max(size for size in range(1, min(most, share) + 1) if share % size == 0)

    @model_validator(mode="after")
    def _profiles(self) -> Train:
        for width in self.ema_profiles:
            if not is_profile_name(width) or self.ema_profiles.count(width) > 1:
                raise ValueError(f"train.ema_profiles: {width}: give a width once, with three decimals at most")
        if self.ema_snapshot_every and not self.ema_profiles:
            raise ValueError(f"train.ema_snapshot_every: {self.ema_snapshot_every} needs train.ema_profiles: set both")
        return self


class Sample(Section):
    """checkpoint -> images."""

    checkpoint: str = "last"
    "'last' (of this run), or the folder or URL of one checkpoint."
    weights: Literal["ema", "model"] = "ema"
    "Which of the checkpoint's weights generate."
    count: int = Field(64, ge=1)
    "Number of images."
    steps: int = Field(250, ge=2, le=1000)
    "Steps of the sampler."
    method: Literal["ddpm", "ddim"] = "ddpm"
    "ADM's respaced ancestral sampler, or DDIM with eta 0."
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    "Classifier-free guidance u + scale (c - u); 1 is none."
    guidance_channels: Annotated[Literal["3", "all"], BeforeValidator(str)] = "3"
    "Latent channels that guidance acts on: the first three (the published FIDs) or all (diffusers)."
    guidance_interval: tuple[Timestep, Timestep] | None = None
    "Guide only between these timesteps (lowest, highest), as [lo, hi]. Unset: always."
    labels: Literal["balanced", "random"] = "balanced"
    "Label of image i: i modulo the classes, or a seeded uniform draw."
    seed: int = Field(0, ge=0, lt=2**63)
    "Image i is a function of (seed, i) alone, whatever the batch size and the pool."
    batch_size: int = Field(32, ge=1)
    "Images an actor generates at a time."
    precision: Literal["fp32", "bf16"] = "fp32"
    "Arithmetic of the network."
    output: Location = ""
    "Folder for the images; unset: samples/ in the run's folder."
    grid_rows: int = Field(8, ge=1)
    "Rows of the grid picture; a column per class, up to ten."

    @model_validator(mode="after")
    def _interval(self) -> Sample:
        if self.guidance_interval and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"sample.guidance_interval: {list(self.guidance_interval)} must be [lowest, highest]")
        return self


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


class Resources(Section):
    """What a run may take from the Ray cluster."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    "Where networks run. auto: on GPUs if the cluster has any."
    worker_cpus: float = Field(1.0, gt=0)
    "CPUs that Ray reserves for each training worker."
    actors: int = Field(1, ge=1)
    "Size of the pool that encodes, samples or evaluates."
    actor_cpus: float = Field(1.0, gt=0)
    "CPUs that Ray reserves for each actor of the pool."
    threads: int | None = Field(None, ge=1)
    "Arithmetic threads of a CPU worker or actor. Unset: as many as its CPUs."


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
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))

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
        if train.warmup_steps >= train.steps:
            raise ValueError(f"train.warmup_steps: {train.warmup_steps} must be less than train.steps = {train.steps}")
        return self

    def to_yaml(self) -> str:
        """The resolved settings, as a file that `--config` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _divisor_hint(number: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return ", ".join(map(str, divisors[:-1])) + (" or " if len(divisors) > 1 else "") + str(divisors[-1])
