"""What is different when a verb runs as a job of `ray job submit`: told before anything is spent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from dico_ray.config import Config, ConfigError

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a submitted job: its runtime environment
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_RAYS_STOP_WAIT_S = 3.0  # where the job's environment says nothing
LEAST_STOP_WAIT_S = 60.0  # a step, a copy to memory and an upload have to fit into it
#            where a verb writes: the first of these settings that is set
_OUTPUTS = {
    "encode": ("data.latents",),
    "sample": ("sample.output", "run.storage"),
    "evaluate": ("evaluate.output", "run.storage"),
    **dict.fromkeys(("train", "sweep", "ema", "import", "report"), ("run.storage",)),
}  # fmt: skip


def runtime_env() -> dict[str, Any] | None:
    """The runtime environment that this job was submitted with; None if the process is no job's command."""
    text = os.environ.get(_JOB)
    return (json.loads(text).get("runtime_env") or {}) if text else None


def check(verb: str, config: Config, words: Sequence[str]) -> str:
    """Returns a warning, or an empty text. words: the command line after the verb.

    Raises ConfigError if the job would write into its own copy of the working directory, which goes with it, or if
    keys stand on its command line, which the dashboard shows.
    """
    env = runtime_env()
    if env is None:
        return ""
    if any(word.split("=")[0] == "--storage.options" for word in words):
        raise ConfigError(
            "--storage.options: a job's command line stands in Ray's dashboard and records; give keys by the nodes' "
            "environment (a Kubernetes secret), workload identity, or a --config file that the head node has"
        )
    if env.get("working_dir"):
        _check_outputs(verb, config)
    return _short_stop(env) if verb in ("train", "sweep") else ""


def _check_outputs(verb: str, config: Config) -> None:
    for path in _OUTPUTS.get(verb, ()):
        section, name = path.split(".")
        location = getattr(getattr(config, section), name)
        if not location:
            continue
        if "://" not in location and os.path.realpath(location).startswith(os.path.realpath(os.getcwd()) + os.sep):
            raise ConfigError(
                f"{path}: {location} is in the job's own copy of the working directory, which is deleted with the job; "
                f"set {path} to an object store's URL, or to an absolute path that all nodes share"
            )
        return


def _short_stop(env: dict[str, Any]) -> str:
    """What `ray job stop` would cost."""
    given = env.get("env_vars", {}).get(STOP_WAIT, os.environ.get(STOP_WAIT))
    seconds = float(given) if given else _RAYS_STOP_WAIT_S
    if seconds >= LEAST_STOP_WAIT_S:
        return ""
    return (
        f"`ray job stop` leaves {seconds:g} s before it kills: too few for a last checkpoint; submit with "
        f"--runtime-env jobs/runtime_env.yaml, or set {STOP_WAIT} in the job's env_vars"
    )
