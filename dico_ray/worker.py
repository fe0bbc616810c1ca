"""What each Ray Train worker runs: builds the engine, continues at the attempt's checkpoint, and trains."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.v2._internal.execution.context import get_train_context

from dico_ray import ingest
from dico_ray.config import Config
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training.attempts import Attempt
from dico_ray.training.checkpoint import Checkpoint, Retention
from dico_ray.training.evaluations import Evaluations
from dico_ray.training.watchdog import Watchdog
from dico_ray.training.writer import CheckpointWriter

CHECKPOINTS, HANGS = "checkpoints", "hangs"
_LOOK_EVERY_S = 0.5
_PATIENCE_S = 300.0  # beyond storage.retry_s, for ranks whose storage is slower


def run(task: dict[str, Any]) -> None:
    """task: config, attempt, checkpoint (Storage or None), passed_over, recorder, about, unlogged (metrics)."""
    import torch
    from ray.train.torch import get_device

    from dico_ray.training.ema import EMA
    from dico_ray.training.loop import train_loop
    from dico_ray.training.prepare import prepare
    from dico_ray.training.validation import Validation

    config = build(task["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(config.resources.threads or max(1, int(config.resources.worker_cpus)))
    took = _Stopwatch()
    model = _model(config)
    took("network")
    engine, path = prepare(model, config, device)
    ema = EMA(engine, config.train.ema_decay, config.train.ema_profiles)
    took("engine")
    start = 0
    if task["checkpoint"]:
        begun = Checkpoint.open(task["checkpoint"])
        checkpoints.restore(begun, engine, ema)
        start = begun.step
        took("checkpoint read")
    validate = None
    if config.train.validate_every:
        validate = Validation(config, engine, ema)
        took("held-out latents")
    shard = ray.train.get_dataset_shard("train")
    batches = ingest.rank_batches(shard, config, engine.rank, start)
    with WorkerReport(config, task, engine, ema, start, took) as report:
        report.tell({"event": "kernels", "text": path})
        train_loop(config, engine, ema, batches, report, task["passed_over"], validate)


def _failed(answer: Any) -> bool:
    """Whether a call of the recorder came to nothing: it is gone, or its storage or service does not answer."""
    try:
        ray.get(answer)
    except RayError:
        return True
    return False


class _Stopwatch:
    """`took("engine")`: seconds since the call before, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def _model(config: Config) -> Any:
    """With the run's initial weights, on every rank the same."""
    import torch

    from dico_ray.models import create_model
    from dico_ray.models.mup import initialize

    torch.manual_seed(config.run.seed)
    sizes = config.model.architecture
    model = create_model(
        config.model.name, hidden_size=sizes.hidden_size, depths=sizes.depths, ffn_ratio=sizes.ffn_ratio,
        num_classes=config.model.num_classes, in_channels=config.model.in_channels,
        class_dropout_prob=0.0,  # the loop drops labels, by seed
    )  # fmt: skip
    if config.train.mup_width:
        initialize(model, config.train.mup_width)
    return model


class WorkerReport:
    """The training loop's report: metrics and events to the recorder, checkpoints to storage.

    `with` it: at the end the last checkpoint is waited for; after an error nothing is.
    """

    def __init__(
        self, config: Config, task: dict[str, Any], engine: Any, ema: Any, start: int, took: _Stopwatch
    ) -> None:
        self._task, self._engine, self._recorder = task, engine, task["recorder"]
        self._run, self._step, self._stop = Storage(config.run.folder), start, ""
        attempt: Attempt = task["attempt"]
        self._unlogged: list[tuple[Any, dict[str, Any]]] = []
        train, storage = config.train, self._run.at(CHECKPOINTS)
        common = (train.max_failed_saves, self._event, config.storage.retry_s + _PATIENCE_S)
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer = CheckpointWriter(
            storage, attempt, engine, partial(checkpoints.state, engine, ema), Retention.of(train), *common, thread,
            evaluations=Evaluations.of(config),
        )  # fmt: skip
        self._averages: CheckpointWriter | None = None
        if train.ema_snapshot_every:
            folder = self._run.at(checkpoints.AVERAGES)
            if engine.rank == 0:
                checkpoints.drop_after(folder, start)
            self._averages = CheckpointWriter(
                folder, attempt, engine, partial(checkpoints.averages, engine, ema), Retention(sys.maxsize), *common,
                thread, storage,
            )  # fmt: skip
        took("memory for checkpoints")
        if engine.rank == 0:
            begin = self._recorder.begin
            ray.get(begin.remote(start, attempt.name, engine.world_size, task["unlogged"], took.seconds))
        self._watchdog = Watchdog(train.hang_timeout_s, self._hangs)
        self._over = threading.Event()
        if engine.rank == 0:
            threading.Thread(target=self._look, daemon=True, name="stop?").start()

    def __enter__(self) -> WorkerReport:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._over.set()
        self._watchdog.close()
        if error is None:
            for writer in self._writers:
                writer.finish()

    @property
    def _writers(self) -> list[CheckpointWriter]:
        return [self._writer, *([self._averages] if self._averages else [])]

    def log(self, metrics: dict[str, Any]) -> None:
        if self._engine.rank == 0 and metrics:
            self._unlogged.append((self._recorder.log.remote(metrics), metrics))

    def save(self, step: int, metrics: dict[str, Any]) -> None:
        """The checkpoint also carries what the recorder has not confirmed: it dies with the driver, workers later."""
        waiting = [answer for answer, _ in self._unlogged]
        if waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        self._unlogged = [(answer, m) for answer, m in self._unlogged if answer in waiting or _failed(answer)]
        unlogged = [m for _, m in self._unlogged]
        self._writer.save(step, {**self._task["about"], "metrics": metrics, "unlogged": unlogged})

    def snapshot(self, step: int, metrics: dict[str, Any]) -> None:
        assert self._averages
        self._averages.save(step, {**self._task["about"], "metrics": metrics})

    def stepped(self, step: int) -> bool:
        self._step = step
        self._watchdog.beat()
        for writer in self._writers:
            writer.poll()
        # Ray's controller leaves the notice in each worker; the public call asks every rank, and takes milliseconds.
        return bool(self._stop) or get_train_context().preemption_context.preemption_info is not None

    def tell(self, event: dict[str, Any]) -> None:
        """An event of rank 0: what the other ranks say alike is said once."""
        if self._engine.rank == 0:
            self._event(event)

    def _event(self, event: dict[str, Any]) -> None:
        self._recorder.event.remote(event)

    def _look(self) -> None:
        """Asks the recorder now and then whether the workers shall stop."""
        while not self._over.wait(_LOOK_EVERY_S):
            self._stop = ray.get(self._recorder.stop_wanted.remote())

    def _hangs(self, text: str) -> None:
        name = f"step-{self._step:08d}-rank-{self._engine.rank:05d}.txt"
        self._run.at(HANGS).write(name, text.encode())
        told = {"event": "hang", "step": self._step, "rank": self._engine.rank, "text": f"{HANGS}/{name}: {text[:100]}"}
        ray.get(self._recorder.event.remote(told), timeout=10)
