"""Reaching a Ray cluster, and finding out whether a run fits on it before anything is spent."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from dico_ray import handover, prometheus, storage
from dico_ray.config import ConfigError, Resources

_LOOK_S = 5.0
# Workers that died are noticed within half a second, and the others are not waited for when they are stopped.
_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5"}


def connect(verbose: bool, run: str = "") -> None:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it), or starts Ray on this machine.

    run: the label of this process's progress in Prometheus; unset: it is not exported.

    Without `verbose` the log lines of Ray's own processes and of libraries stay in their files, and those of Ray's
    core in this process go to dico-ray-PID.log in the temporary folder.
    """
    if not verbose:
        quiet()
    if run:
        prometheus.export_progress(run)
    if ray.is_initialized():
        return
    if not verbose:
        _mute_native_log()
    level = logging.INFO if verbose else logging.ERROR
    for name, value in _TRAIN.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" in os.environ:
        place = handover.new_place()
        env = handover.runtime_env(place)
        env["env_vars"] |= {name: os.environ[name] for name in _TRAIN}
        ray.init(log_to_driver=verbose, logging_level=level, runtime_env=env)
        handover.leave(place, storage.environment())
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=verbose, logging_level=level)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose


def _mute_native_log() -> None:
    """Sends file descriptor 2, where Ray's C++ core logs past Python, to a file; Python keeps the terminal."""
    terminal = os.dup(2)
    path = os.path.join(tempfile.gettempdir(), f"dico-ray-{os.getpid()}.log")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 2)
    os.close(log)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)


def quiet() -> None:
    """Only warnings that a user can act on: those of this project."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.simplefilter("ignore")
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "diffusers", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def uses_gpu(resources: Resources) -> bool:
    """Whether networks run on GPUs. Raises ConfigError if GPUs are asked for and the cluster has none."""
    available = ray.cluster_resources().get("GPU", 0)
    if resources.accelerator == "gpu" and not available:
        raise ConfigError("resources.accelerator: 'gpu', but the Ray cluster has no GPU; add GPU nodes or take cpu")
    return resources.accelerator != "cpu" and available > 0


def has_room(size: int, bundle: dict[str, float], also: dict[str, float], wait_s: float = _LOOK_S) -> bool:
    """Whether so many bundles, and what is wanted beside them, find room within `wait_s` seconds."""
    group = placement_group([bundle] * size + ([also] if also else []), strategy="PACK")
    try:
        return bool(group.wait(wait_s))
    finally:
        remove_placement_group(group)


def room_for(
    sizes: Sequence[int], bundle: dict[str, float], also: dict[str, float], timeout_s: float, setting: str
) -> int:
    """The first of `sizes`, the largest first, that the cluster has room for now; waits for the smallest.

    Other jobs, nodes that are being drained and resources not yet released all count. Raises ConfigError.
    """
    until = time.monotonic() + timeout_s
    while True:
        for size in sizes:
            if has_room(size, bundle, also):
                return size
        if time.monotonic() > until:
            have = ray.available_resources()
            raise ConfigError(
                f"{setting}: no room for {sizes[-1]} workers of {bundle} within {timeout_s:g} s "
                f"(train.start_timeout_s); free are {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; "
                f"add nodes, or lower {setting}"
            )


def actor_options(resources: Resources, gpu: bool) -> dict[str, float]:
    """What Ray reserves for one actor of a pool."""
    return {"num_cpus": resources.actor_cpus, "num_gpus": resources.actor_gpus if gpu else 0}


def worker_bundle(resources: Resources, gpu: bool) -> dict[str, float]:
    """What Ray reserves for a training worker."""
    return {"CPU": resources.worker_cpus, **({"GPU": resources.worker_gpus} if gpu else {})}


def require_pool(resources: Resources, gpu: bool) -> None:
    """Raises ConfigError if the whole cluster could never hold the pool."""
    actors, each = resources.actors, actor_options(resources, gpu)
    require(actors * each["num_cpus"], actors * each["num_gpus"], f"a pool of {actors} actors", "resources.actors")


def require(cpus: float, gpus: float, what: str, setting: str) -> None:
    """Raises ConfigError if the whole cluster could never hold `what`, instead of waiting for ever."""
    total = ray.cluster_resources()
    for kind, need in (("CPU", cpus), ("GPU", gpus)):
        have = total.get(kind, 0)
        if need > have:
            raise ConfigError(
                f"{what} needs {need:g} {kind}s and the Ray cluster has {have:g}; lower {setting} or add nodes"
            )
