"""The door `train`: latent shards -> Ray Data -> Ray Train workers -> DeepSpeed -> checkpoints, EMA weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dico_ray import cluster, ingest
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.data.shards import Manifest
from dico_ray.progress import Progress
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training import posthoc
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.telemetry import MetricsLog
from dico_ray.training.track import Tracker, open_tracker

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
_POLL_S = 0.5


class TrainingFailedError(UserError):
    """Training ended for a reason that the workers told."""


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray train`: runs or continues the run (run.storage, run.name) up to train.steps.

    Raises ConfigError before anything starts if data, model and cluster do not fit together, and
    TrainingFailedError if the workers failed more often than train.max_failures.
    """
    run = Storage(config.run.folder)
    manifest = Manifest.load(Storage(config.data.latents))
    check_fits(config, manifest)
    start = resume_step(config, manifest)
    if start >= config.train.steps:
        print(f"train: {config.run.folder} has its checkpoint of step {start}: nothing to do")
        return
    run.write(CONFIG, config.to_yaml().encode())
    cluster.connect(verbose)
    gpu = cluster.uses_gpu(config.resources)
    workers = config.train.num_workers
    cluster.require(
        workers * config.resources.worker_cpus + ingest.READ_TASK_CPUS,
        workers if gpu else 0,
        f"training with {workers} workers, and a CPU share for reading data,",
        "train.num_workers or resources.worker_cpus",
    )
    ingest.check_memory(config, manifest)
    recorder = _start_recorder(config, start)
    with _display(config, recorder, start):
        _fit(config, manifest, recorder, gpu)
    ray.get(recorder.close.remote())
    last = Checkpoint.last(run.at(CHECKPOINTS))
    assert last is not None
    print(f"train: step {last.step}, checkpoint {last.storage.url}")


def check_fits(config: Config, manifest: Manifest) -> None:
    """Raises ConfigError if the model cannot take the data set's latents or labels."""
    model, size = config.model, (config.model.latent_size,) * 2
    where = f"the latents of {config.data.latents}"
    if manifest.latent_channels != model.in_channels:
        raise ConfigError(f"model.in_channels: {model.in_channels}, but {where} have {manifest.latent_channels}")
    if manifest.latent_size != size:
        raise ConfigError(f"model.latent_size: {model.latent_size}, but {where} are {manifest.latent_size}")
    if config.train.flip and manifest.flips == 1:
        raise ConfigError(f"train.flip: true, but {where} hold no mirrored images' latents; set train.flip false")
    if len(manifest.classes) > model.num_classes:
        raise ConfigError(f"model.num_classes: {model.num_classes}, but {where} have {len(manifest.classes)}")


def resume_step(config: Config, manifest: Manifest) -> int:
    """Steps that the run's last committed checkpoint has behind it; 0 for a new run.

    Raises ConfigError if settings that define the order of data or the draws changed since (the run would be no
    longer a function of its config), or a width of train.ema_profiles was added.
    """
    last = Checkpoint.last(Storage(config.run.folder).at(CHECKPOINTS))
    if last is None:
        return 0
    before, now = last.about["identity"], identity(config, manifest)
    for name, value in now.items():
        if before[name] != value:
            raise ConfigError(
                f"{name}: {value!r}, but the run {config.run.name} was begun with {before[name]!r}; "
                "restore it, or take another run.name"
            )
    last.check_has(map(posthoc.kind, config.train.ema_profiles))
    return last.step


def identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch": config.train.global_batch,
        "train.flip": config.train.flip,
        "train.label_drop": config.train.label_drop,
        "data.window_samples": config.data.window_samples,
        "data.latents (hash)": manifest.hash,
    }


def _start_recorder(config: Config, start: int) -> Any:
    """An actor beside the driver that keeps the run's metrics, wherever rank 0 happens to live.

    Raises ConfigError if a tracking service cannot be had.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    recorder: Any = ray.remote(_Recorder).options(num_cpus=0, scheduling_strategy=here)
    recorder = recorder.remote(config)
    try:
        ray.get(recorder.begin.remote(start))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    return recorder


class _Recorder:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._log: MetricsLog | None = None
        self._trackers: list[Tracker] | None = None
        self._latest: dict[str, Any] = {}

    def begin(self, start: int) -> None:
        """The run, or a worker group of it, begins (again) after `start` steps."""
        run = Storage(self._config.run.folder)
        if self._log:
            self._log.close()
        self._log = MetricsLog(run, start)
        if self._trackers is None:
            about = self._config.model_dump(mode="json")
            self._trackers = [open_tracker(s, run.url, self._config.run.name, about) for s in self._config.run.track]

    def log(self, metrics: dict[str, Any]) -> None:
        metrics["object_store_mb"] = ingest.object_store_use()[0] / 1e6
        self._latest = metrics
        assert self._log and self._trackers is not None
        for log in (self._log, *self._trackers):
            log.log(metrics)

    def latest(self) -> dict[str, Any]:
        return self._latest

    def close(self) -> None:
        assert self._log and self._trackers is not None
        for log in (self._log, *self._trackers):
            log.close()


@contextmanager
def _display(config: Config, recorder: Any, start: int) -> Iterator[None]:
    """Shows progress while the body runs. The thread only reads; it ends with the body."""
    stop = threading.Event()

    def show() -> None:
        with Progress("train", config.train.steps, "steps", start) as progress:
            while True:
                over = stop.wait(_POLL_S)
                latest: dict[str, Any] = ray.get(recorder.latest.remote())
                if latest:
                    text = f"{latest['images_per_s']:.0f} images/s, loss {latest['loss']:.4f}"
                    progress.update(latest["step"], text)
                if over:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def _fit(config: Config, manifest: Manifest, recorder: Any, gpu: bool) -> None:
    """One Ray Train run. A worker group that dies is started again, and continues at the last checkpoint."""

    def dataset() -> ray.data.Dataset:  # called anew for every worker group
        return ingest.training_dataset(config, manifest, resume_step(config, manifest))

    resources = {"CPU": config.resources.worker_cpus, **({"GPU": 1.0} if gpu else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(), "manifest": manifest, "recorder": recorder},
        scaling_config=ScalingConfig(num_workers=config.train.num_workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(execution_options=ingest.execution_options(), enable_shard_locality=False),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=Storage(config.run.storage).url,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _told(error) from error


def _told(error: BaseException) -> BaseException:
    """A worker's own explanation, if one of them gave it; otherwise the error as it is."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = failure
        while cause is not None:
            inner = getattr(cause, "cause", None)
            if isinstance(cause, UserError) or isinstance(inner, UserError):
                return TrainingFailedError(str(inner if isinstance(inner, UserError) else cause))
            cause = cause.__cause__ or inner
    return error


def _worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import torch
    from ray.train.torch import get_device

    from dico_ray.models import create_model
    from dico_ray.training.ema import EMA
    from dico_ray.training.engine import Engine
    from dico_ray.training.loop import train_loop

    config = build(loop_config["config"])
    manifest: Manifest = loop_config["manifest"]
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(config.resources.threads or max(1, int(config.resources.worker_cpus)))
    torch.manual_seed(config.run.seed)  # every rank makes the same initial weights
    sizes = config.model.architecture
    model = create_model(
        config.model.name, hidden_size=sizes.hidden_size, depths=sizes.depths, ffn_ratio=sizes.ffn_ratio,
        num_classes=config.model.num_classes, in_channels=config.model.in_channels,
        class_dropout_prob=0.0,  # the loop drops labels, by seed
    )  # fmt: skip
    engine = Engine(model, config.train, device)
    ema = EMA(engine, config.train.ema_decay, config.train.ema_profiles)
    last = Checkpoint.last(Storage(config.run.folder).at(CHECKPOINTS))
    if last:
        checkpoints.restore(last, engine, ema)
    start = last.step if last else 0
    report = _Report(config, manifest, engine, ema, loop_config["recorder"], start)
    shard = ray.train.get_dataset_shard("train")
    rank = ray.train.get_context().get_world_rank()
    train_loop(config, engine, ema, ingest.rank_batches(shard, config, rank, start), report)


class _Report:
    """The training loop's report: metrics to the recorder, checkpoints to the run's folder."""

    def __init__(self, config: Config, manifest: Manifest, engine: Any, ema: Any, recorder: Any, start: int) -> None:
        self._config, self._manifest, self._engine, self._ema = config, manifest, engine, ema
        self._recorder = recorder
        run = Storage(config.run.folder)
        self._storage, self._averages = run.at(CHECKPOINTS), run.at(checkpoints.AVERAGES)
        if engine.rank == 0:
            checkpoints.drop_after(self._averages, start)
            ray.get(recorder.begin.remote(start))

    def log(self, metrics: dict[str, Any]) -> None:
        if self._engine.rank == 0:
            self._recorder.log.remote(metrics)

    def save(self, step: int) -> None:
        checkpoints.save(self._storage, step, self._engine, self._ema, self._about())
        if self._engine.rank == 0:
            checkpoints.retain(self._storage, self._config.train.keep_checkpoints)

    def snapshot(self, step: int) -> None:
        checkpoints.save_averages(self._averages, step, self._engine, self._ema, self._about())

    def _about(self) -> dict[str, Any]:
        return {
            "config": self._config.model_dump(mode="json"),
            "identity": identity(self._config, self._manifest),
            "codec": self._manifest.codec,
            "classes": list(self._manifest.classes),
        }
