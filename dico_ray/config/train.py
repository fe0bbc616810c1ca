"""Training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dico_ray.config.base import PositiveInt, Probability, Section

BUCKET_ELEMENTS = 50_000_000  # of gradients, reduced at a time; DeepSpeed's own default of 5e8 takes gigabytes
WIDEST_PROFILE = 0.28  # sigma_rel ends at 1 / sqrt(12), where the profile is flat (arXiv 2312.02696)


ProfileWidth = Annotated[float, Field(gt=0, lt=WIDEST_PROFILE)]


def is_profile_name(width: float) -> bool:
    """Whether three decimals tell a profile's relative width: it is kept under that name."""
    return width == round(width, 3)


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
    parametrization: Literal["standard", "mup"] = "standard"
    "mup: initial weights and learning rates by which the best train.lr moves less with the width (arXiv 2203.03466)."
    base_width: int | None = Field(None, ge=4)
    "With mup: the model.hidden_size that train.lr is meant for (the tuned one), where mup and standard are the same."
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
    "Compile blocks that run by plain PyTorch on GPUs (model.kernels), once for each width (not at ZeRO stage 3)."
    cuda_graphs: bool = True
    "Capture the stages' passes as CUDA graphs, so that GPUs do not wait for the host (not at ZeRO stage 3)."
    recompute_gelu: bool = True
    "Fused blocks (model.kernels) make the feed-forward GELU again for their backward pass: less memory, more traffic."
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
    "Metric by which checkpoints are compared: a logged one, such as val_loss, or an evaluation's, such as fid."
    max_failed_saves: int = Field(3, ge=0)
    "Checkpoints in a row that may fail to be written before the run stops (each is tried for storage.retry_s)."
    max_skipped_steps: int = Field(5, ge=1)
    "Steps in a row with gradients that are not finite (they are skipped) before the run goes back to its checkpoint."
    hang_timeout_s: float = Field(1800.0, gt=0)
    "Seconds without a finished step after which a worker writes its stacks to hangs/ in the run's folder and restarts."
    log_every: int = Field(100, ge=1)
    "Steps between logged metrics (the logged loss is the mean over these steps)."
    validate_every: int | None = Field(None, ge=1)
    "Steps between losses of the EMA weights on data.validation (val_loss); the last step has one. Unset: none."
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

    @property
    def mup_width(self) -> int | None:
        """The base width of muP; None without muP."""
        return self.base_width if self.parametrization == "mup" else None

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

    @model_validator(mode="after")
    def _mup_has_a_base(self) -> Train:
        if self.parametrization == "mup" and self.base_width is None:
            raise ValueError(
                "train.base_width: unset, but train.parametrization mup reads train.lr at a base width; "
                "set it to the model.hidden_size whose learning rate is known"
            )
        return self
