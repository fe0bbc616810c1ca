"""Reaching a Ray cluster, and finding out whether a run fits on it before anything is spent."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings

import ray

from dico_ray import storage
from dico_ray.config import ConfigError, Resources


def connect(verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it), or starts Ray on this machine.

    Without `verbose` the log lines of Ray's own processes and of libraries stay in their files, and those of Ray's
    core in this process go to dico-ray-PID.log in the temporary folder.
    """
    if not verbose:
        quiet()
    if ray.is_initialized():
        return
    if not verbose:
        _mute_native_log()
    level = logging.INFO if verbose else logging.ERROR
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=verbose, logging_level=level, runtime_env={"env_vars": storage.environment()})
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


def require(cpus: float, gpus: float, what: str, setting: str) -> None:
    """Raises ConfigError if the whole cluster could never hold `what`, instead of waiting for ever."""
    total = ray.cluster_resources()
    for kind, need in (("CPU", cpus), ("GPU", gpus)):
        have = total.get(kind, 0)
        if need > have:
            raise ConfigError(
                f"{what} needs {need:g} {kind}s and the Ray cluster has {have:g}; lower {setting} or add nodes"
            )
