"""GPU memory of a training worker: what of it ZeRO divides, and the micro-batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from dico_ray import accelerators
from dico_ray.accelerators import Accelerator
from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config, ConfigError
from dico_ray.config.train import BUCKET_ELEMENTS
from dico_ray.planning.activations import activation_bytes, path_of, working_bytes

_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default


@dataclass(frozen=True)
class State:
    """Bytes per GPU of a run's training state; activations come on top.

    buffers: where gradients are collected before they are sent, or at stage 3 the weights that were gathered. host:
    bytes in the host's memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers


@dataclass(frozen=True)
class Fit:
    """What a GPU takes of a run.

    workers: as many share the state. micro_batch: most samples of a forward pass, among those that divide a
    worker's share of the global batch; 0 if not even one fits. largest: the same, whatever the global batch.
    memory_gb: taken at micro_batch (at 1, if that does not fit). room_gb: what there is for it.
    """

    workers: int
    micro_batch: int
    largest: int
    memory_gb: float
    room_gb: float


def gpu_of(config: Config) -> Accelerator:
    """The data sheet's row for hardware.gpu. Raises ConfigError for a GPU without one."""
    found = accelerators.find(config.hardware.gpu)
    if not found:
        known = ", ".join(accelerators.ACCELERATORS)
        raise ConfigError(f"hardware.gpu: {config.hardware.gpu!r} is not in the table; take one of {known}")
    return found


def room(config: Config) -> float:
    """Bytes of a GPU that a worker's tensors may take."""
    hardware = config.hardware
    total = hardware.memory_gb * 1e9 if hardware.memory_gb else gpu_of(config).memory
    return total * hardware.memory_share * config.resources.worker_gpus


def state_memory(
    parameters: int, stage: int, world_size: int, precision: str, averages: int = 1, offload: bool = False,
    graphs: bool = False,
) -> State:  # fmt: skip
    """Bytes per GPU by ZeRO stage (arXiv 1910.02054, section 3): which parts are divided by the world size.

    The network's weights take 2 bytes in bf16 and 4 in fp32; gradients accumulate in fp32; the optimizer holds
    fp32 master weights (in fp32 at stage 0 they are the network's own) and two moments; the averages (EMA and
    profiles) are fp32, and dealt out at every stage. Offloaded, optimizer and averages lie in the host's memory.
    Graphs: CUDA graphs leave each micro-batch's gradients in tensors that stay, of the network's arithmetic.
    On several ranks stage 2 collects gradients in fp32 before it sends them, and stage 3 keeps weights that it gathered
    until they are used again, up to DeepSpeed's stage3_max_live_parameters.
    """
    weight = 2 if precision == "bf16" else 4
    master = 0 if stage == 0 and precision == "fp32" else 4
    gradient = 2 if stage == 0 and precision == "bf16" else 4

    def share(nbytes: int, divided: bool) -> int:
        return -(-nbytes // world_size) if divided else nbytes

    buffers = 0
    if world_size > 1 and stage == 2 and not offload:
        buffers = 4 * min(parameters, BUCKET_ELEMENTS)
    if world_size > 1 and stage == 3:
        buffers = weight * min(parameters, _LIVE_PARAMETERS)
    optimizer, ema = share(parameters * (master + 8), stage >= 1), share(parameters * 4 * averages, True)
    return State(
        weights=share(parameters * weight, stage >= 3),
        gradients=share(parameters * gradient, stage >= 2) + parameters * weight * graphs,
        optimizer=0 if offload else optimizer,
        ema=0 if offload else ema,
        buffers=buffers,
        host=optimizer + ema if offload else 0,
    )


def config_state(config: Config, stage: int, workers: int) -> State:
    """The state of a config's run at another stage, or on other workers, than its own."""
    train = config.train
    count, averages = parameter_count(config.model), 1 + len(train.ema_profiles)
    graphs = train.cuda_graphs and stage < 3
    return state_memory(count, stage, workers, train.precision, averages, train.offload and stage > 0, graphs)


def image_bytes(config: Config, stage: int, recompute: bool = False) -> int:
    """What each image of a micro-batch takes: activations, and gradients at the height of the backward pass."""
    path = path_of(config, stage)
    value = 2 if config.train.precision == "bf16" else 4
    return activation_bytes(config.model, path, value, recompute) + working_bytes(config.model, value)


def largest_micro_batch(config: Config, stage: int, workers: int, recompute: bool = False) -> int:
    """Most samples of a forward pass that fit, whatever the global batch; 0 if none does."""
    left = room(config) - config_state(config, stage, workers).total
    return max(0, int(left // image_bytes(config, stage, recompute)))


def fits(config: Config, workers: int | None = None) -> Fit:
    """How much of a run one hardware.gpu takes: the largest micro-batch that fits, and the memory that it needs.

    For the run's own train.zero_stage, precision, offload and compile, its state shared by `workers` workers of one
    GPU each (None: the most that train.num_workers allows). micro_batch is 0 where not even one sample fits; then
    `check` tells what to change. The forecast leaves out workspaces (under 1 GB), which
    hardware.memory_share makes room for.

    Raises ConfigError if workers do not divide train.global_batch, or hardware.gpu is unknown.
    """
    train = config.train
    workers = workers or train.world_sizes[0]
    share, rest = divmod(train.global_batch, workers)
    if rest or not share:
        raise ConfigError(f"train.global_batch: {train.global_batch} does not divide among {workers} workers")
    largest = largest_micro_batch(config, train.zero_stage, workers)
    micro = max((size for size in range(1, min(largest, share) + 1) if share % size == 0), default=0)
    need = memory_at(config, train.zero_stage, workers, max(1, micro))
    return Fit(workers, micro, largest, need / 1e9, room(config) / 1e9)


def memory_at(config: Config, stage: int, workers: int, micro_batch: int) -> int:
    """Bytes per GPU of state and activations at that micro-batch."""
    return config_state(config, stage, workers).total + micro_batch * image_bytes(config, stage)


def check(config: Config, workers: int | None = None) -> None:
    """Raises ConfigError, one line with what to change, if the run's micro-batch does not fit on hardware.gpu."""
    train, fit = config.train, fits(config, workers)
    micro = train.micro_batch_on(fit.workers)
    if micro <= fit.largest:
        return
    need = memory_at(config, train.zero_stage, fit.workers, micro) / 1e9
    name = f"train.micro_batch: {micro}" + ("" if train.micro_batch else " (unset: a worker's whole share)")
    raise ConfigError(
        f"{name} takes {need:.1f} GB of a GPU, and {config.hardware.gpu} has room for {fit.room_gb:.1f} (hardware."
        f"memory_share of it); {mend(config, fit)}"
    )


def mend(config: Config, fit: Fit) -> str:
    """What to change so that the run fits: its micro-batch, else the ZeRO stage, else the number of workers."""
    train = config.train
    if fit.micro_batch:
        return f"set train.micro_batch {fit.micro_batch}"
    for stage in range(train.zero_stage + 1, 4):
        if most := largest_micro_batch(config, stage, fit.workers):
            return f"set train.zero_stage {stage} (and train.micro_batch at most {most})"
    sizes = (size for size in range(fit.workers + 1, train.global_batch + 1) if train.global_batch % size == 0)
    for size in sizes:
        for stage in range(max(1, train.zero_stage), 4):
            if most := largest_micro_batch(config, stage, size):
                return f"set train.num_workers {size}, train.zero_stage {stage} and train.micro_batch at most {most}"
    if not train.offload:
        return "not even all workers that the batch divides among are enough: try train.offload true, or larger GPUs"
    return "take GPUs with more memory (hardware.gpu), or a smaller model or latent"
