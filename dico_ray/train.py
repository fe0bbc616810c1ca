"""The door `train`: latent shards -> Ray Data -> Ray Train workers -> DeepSpeed -> checkpoints, EMA weights."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dico_ray import cluster, evaluator, ingest, recorder, worker
from dico_ray.config import Config, ConfigError, Train, UserError
from dico_ray.data.shards import Manifest, ShardError
from dico_ray.evaluator import Evaluator
from dico_ray.progress import Progress
from dico_ray.settings import build, merge
from dico_ray.storage import Storage
from dico_ray.training import attempts, posthoc
from dico_ray.training.attempts import Attempt, FencedError
from dico_ray.training.checkpoint import Checkpoint, DamagedError
from dico_ray.training.ema import initial_share
from dico_ray.training.evaluations import Evaluations
from dico_ray.training.loop import DivergedError
from dico_ray.training.validation import check_held_out
from dico_ray.worker import CHECKPOINTS

CONFIG, PASSED_OVER = "config.yaml", "passed_over.json"
_POLL_S = 0.5
_STANDARD = {"train.parametrization": "standard", "train.base_width": None}  # of runs from before there was a choice


class TrainingFailedError(UserError):
    """Training ended for a reason that the workers told."""


class StoppedError(UserError):
    """Training was asked to end, and has committed a checkpoint."""


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray train`: runs or continues the run (run.storage, run.name) up to train.steps.

    Raises ConfigError before anything starts if data, model and cluster do not fit together, TrainingFailedError if
    the workers failed more often than train.max_failures, FencedError if another run of that name took over, and
    StoppedError after SIGTERM or Ctrl-C, once a checkpoint is committed.
    """
    run = Storage(config.run.folder)
    manifest = Manifest.load(Storage(config.data.latents))
    check_fits(config, manifest)
    if config.train.validate_every:
        check_held_out(config, manifest)
    due = Evaluations.of(config)
    if due:
        evaluator.check(config)
    last = check_resumes(config, manifest)
    if last and last.step >= config.train.steps and not (due and due.due()):
        print(f"train: {config.run.folder} has its checkpoint of step {last.step}: nothing to do")
        return
    if told := short_for_average(config.train):
        print(f"train: {told}", flush=True)
    run.write(CONFIG, config.to_yaml().encode())
    cluster.connect(verbose, config.run.name)
    gpu, least = cluster.uses_gpu(config.resources), config.train.world_sizes[-1]
    cluster.require(
        least * config.resources.worker_cpus + ingest.READ_TASK_CPUS,
        least * config.resources.worker_gpus if gpu else 0,
        f"training with {least} workers, and a CPU share for reading data,",
        "train.num_workers or resources.worker_cpus",
    )
    ingest.check_memory(config, manifest)
    keeper = recorder.start(config)
    beside = Evaluator(config, due, keeper) if due else None
    try:
        with _stopping(keeper), _display(config, keeper, last.step if last else 0), beside or nullcontext():
            end = _Launch(config, manifest, keeper, gpu, beside).run()
            if beside:
                beside.finish()
    except (UserError, ray.train.TrainingFailedError) as error:
        _end(keeper, " ".join(str(error).split())[:500])
        raise
    _end(keeper, f"trained to step {end.step}")
    print(f"train: step {end.step}, checkpoint {end.storage.url}")


def _end(keeper: Any, text: str) -> None:
    """The run's last event; then all that is logged is written out."""
    ray.get(keeper.event.remote({"event": "end", "text": text}))
    ray.get(keeper.close.remote())


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


def short_for_average(train: Train) -> str:
    """What to know of a run that ends before its averages have forgotten the initial weights; empty otherwise."""
    share = initial_share(train.ema_decay, train.steps)
    if not share:
        return ""
    return (
        f"at train.steps = {train.steps} the averaged weights, which samples and validations are of, will be "
        f"{100 * share:.0f}% the initial ones by train.ema_decay {train.ema_decay:g}; {_fitting(train.steps):g} would "
        "leave 1%"
    )


def _fitting(steps: int) -> float:
    """The decay, in two significant digits of what it lacks to 1, by which 1% of the initial weights is left."""
    return 1 - float(f"{1 - 0.01 ** (1 / steps):.1e}")


def check_resumes(config: Config, manifest: Manifest) -> Checkpoint | None:
    """The run's last committed checkpoint; None for a new run.

    Raises ConfigError if settings that define the order of data or the draws changed since (the run would be no
    longer a function of its config), or a width of train.ema_profiles was added.
    """
    last = Checkpoint.last(Storage(config.run.folder).at(CHECKPOINTS))
    if last is None:
        return None
    if "exp_avg" not in last.kinds:
        raise ConfigError(
            f"run.name: {last.storage.url} is imported: it has no optimizer state to continue from; "
            "take another run.name to train"
        )
    before, now = _STANDARD | last.about["identity"], identity(config, manifest)
    for name, value in now.items():
        if before[name] != value:
            raise ConfigError(
                f"{name}: {value!r}, but the run {config.run.name} was begun with {before[name]!r}; "
                "restore it, or take another run.name"
            )
    last.check_has(map(posthoc.kind, config.train.ema_profiles))
    return last


def identity(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch": config.train.global_batch,
        "train.flip": config.train.flip,
        "train.label_drop": config.train.label_drop,
        "train.parametrization": config.train.parametrization,
        "train.base_width": config.train.mup_width,
        "data.window_samples": config.data.window_samples,
        "data.latents (hash)": manifest.hash,
    }


@dataclass
class _Launch:
    """One command's way through failures: each group of workers is an attempt, on what the cluster has room for."""

    config: Config
    manifest: Manifest
    keeper: Any
    gpu: bool
    beside: Evaluator | None = None

    def __post_init__(self) -> None:
        self._run = Storage(self.config.run.folder)
        self._storage = self._run.at(CHECKPOINTS)
        self._name = uuid4().hex
        self._mine: Attempt | None = None
        self._bundle = cluster.worker_bundle(self.config.resources, self.gpu)

    def run(self) -> Checkpoint:
        """Returns the checkpoint of train.steps."""
        failures = 0
        while True:
            last = self._claim()
            step = last.step if last else 0
            if last and step >= self.config.train.steps:
                return last
            reason: str = ray.get(self.keeper.stop_wanted.remote())
            if reason not in ("", recorder.RESTART):
                raise _stopped(reason, step)
            try:
                self._attempt(last)
            except ray.train.TrainingFailedError as error:
                failures += 1
                self._failed(error, failures)

    def _claim(self) -> Checkpoint | None:
        """Makes this launch's next attempt the run's newest, and says which checkpoint it begins at."""
        self._mine = attempts.claim(self._storage, self._name, self._mine)
        last = check_resumes(self.config, self.manifest)
        self._mine = attempts.settle(self._storage, self._mine, last.step if last else 0)
        return last

    def _failed(self, error: Exception, failures: int) -> None:
        """Notes a failure. Raises what ended the run, if that is not worth another attempt."""
        cause, most = cause_of(error), self.config.train.max_failures
        text = str(cause) if cause else _deaths(error)
        ray.get(self.keeper.event.remote({"event": "failure", "count": failures, "text": text}))
        if isinstance(cause, FencedError):
            raise cause
        if isinstance(cause, DivergedError) and failures <= most:
            steps = sorted({*_passed_over(self._run), *cause.steps})
            self._run.write(PASSED_OVER, json.dumps(steps).encode())
            passed = {"event": "passed over", "steps": cause.steps, "text": f"steps {cause.steps} are left out"}
            ray.get(self.keeper.event.remote(passed))
        if failures > most or isinstance(cause, ConfigError | ShardError | DamagedError):
            raise (TrainingFailedError(str(cause)) if cause else error) from error

    def _attempt(self, last: Checkpoint | None) -> None:
        """One group of workers, from start to end."""
        train, step = self.config.train, last.step if last else 0
        also = {"CPU": ingest.READ_TASK_CPUS}
        if self.beside and self._mine:
            self.beside.make_room(self._mine.name)
        size = cluster.room_for(train.world_sizes, self._bundle, also, train.start_timeout_s, "train.num_workers")
        config = build(merge(self.config.model_dump(), {"train": {"num_workers": size, **self._micro(size)}}))
        dataset = ingest.training_dataset(config, self.manifest, step)
        task = {
            "config": config.model_dump(), "attempt": self._mine, "checkpoint": last.storage if last else None,
            "passed_over": _passed_over(self._run), "recorder": self.keeper, "about": about(config, self.manifest),
            "unlogged": last.about.get("unlogged", []) if last else [],
        }  # fmt: skip
        fs, path = Storage(self.config.run.storage).for_arrow()
        trainer = TorchTrainer(
            worker.run,
            train_loop_config=task,
            scaling_config=ScalingConfig(num_workers=size, use_gpu=self.gpu, resources_per_worker=self._bundle),
            torch_config=TorchConfig(backend="nccl" if self.gpu else "gloo", timeout_s=int(train.hang_timeout_s) + 60),
            datasets={"train": dataset},
            dataset_config=ray.train.DataConfig(
                execution_options=ingest.execution_options(), enable_shard_locality=False
            ),
            run_config=RunConfig(name=self.config.run.name, storage_path=path, storage_filesystem=fs),
        )
        self._await(trainer, size)

    def _micro(self, size: int) -> dict[str, Any]:
        """The micro-batch that the configured most comes to on so many workers."""
        return {"micro_batch": self.config.train.micro_batch_on(size)}

    def _await(self, trainer: TorchTrainer, size: int) -> None:
        """Runs it in a thread, so that signals are ours; asks for a restart when there is room for more workers."""
        outcome: list[BaseException | None] = []

        def fit() -> None:
            try:
                trainer.fit()
                outcome.append(None)
            except BaseException as error:  # noqa: BLE001 - carried to the caller, whole
                outcome.append(error)

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        looked = time.monotonic()
        larger = [n for n in self.config.train.world_sizes if n > size]
        while not outcome:
            thread.join(_POLL_S)
            if larger and time.monotonic() - looked > self.config.train.grow_every_s:
                looked = time.monotonic()
                if any(cluster.has_room(n - size, self._bundle, {"CPU": ingest.READ_TASK_CPUS}) for n in larger):
                    ray.get(self.keeper.want_stop.remote(recorder.RESTART))
        if outcome[0]:
            raise outcome[0]


def about(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Facts that every checkpoint carries."""
    return {
        "config": config.model_dump(mode="json"),
        "identity": identity(config, manifest),
        "codec": manifest.codec,
        "classes": list(manifest.classes),
    }


def _passed_over(run: Storage) -> list[int]:
    """Steps whose batches the run leaves out since their gradients were not finite."""
    return json.loads(run.read(PASSED_OVER)) if run.exists(PASSED_OVER) else []


def cause_of(error: BaseException) -> UserError | None:
    """A worker's own explanation, if one of them gave it."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = failure
        while cause is not None:
            inner = getattr(cause, "cause", None)
            if isinstance(inner, UserError):
                return inner
            if isinstance(cause, UserError):
                return cause
            cause = cause.__cause__ or inner
    return None


def _deaths(error: BaseException) -> str:
    """Who failed, where no worker could tell why."""
    failures = getattr(error, "worker_failures", {})
    told = [f"rank {rank}: {type(failure).__name__}" for rank, failure in sorted(failures.items())]
    return ", ".join(told) or " ".join(str(error).split())[:200]


def _stopped(reason: str, step: int) -> StoppedError:
    error = StoppedError(f"stopped by {reason} after step {step}; the same command continues there")
    error.exit_code = 128 + signal.Signals[reason]
    return error


@contextmanager
def _stopping(keeper: Any) -> Iterator[None]:
    """While the body runs, SIGTERM and Ctrl-C ask the workers for a last checkpoint; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print(f"train: {signal.Signals(number).name}: saving a checkpoint; once more ends at once", flush=True)
        keeper.want_stop.remote(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display(config: Config, keeper: Any, start: int) -> Iterator[None]:
    """Shows progress and events while the body runs. The thread only reads; it ends with the body."""
    stop = threading.Event()

    def show() -> None:
        with Progress("train", config.train.steps, "steps", start) as progress:
            while True:
                over = stop.wait(_POLL_S)
                latest, events = ray.get(keeper.latest.remote())
                for event in events:
                    if event["event"] not in ("checkpoint", "start") or event.get("step") not in (0, start):
                        progress.note(f"{event['event']}: {event['text']}")
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
