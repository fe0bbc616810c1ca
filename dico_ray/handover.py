"""Hands the storage settings to the processes that Ray starts, keys included, past all that Ray shows or logs.

A runtime environment's variables stand in the dashboard, the job's record and the logs. So they only name a place in
the cluster's own key-value store, out of which each worker process fetches the settings before its first task.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from typing import Any
from uuid import uuid4

import ray
from ray.experimental import internal_kv

_NAMESPACE = b"dico-ray"
_PLACE = "DICO_RAY_HANDOVER"  # the variable that names the place
_WAIT_S = 60.0


def runtime_env(place: str) -> dict[str, Any]:
    """What workers need to find the settings that `leave` will put there; the call may come after they start."""
    return {"env_vars": {_PLACE: place}, "worker_process_setup_hook": f"{__name__}.take"}


def new_place() -> str:
    return uuid4().hex


def leave(place: str, variables: dict[str, str]) -> None:
    """Puts variables for this process's workers there, until it ends. Ray must be initialised."""
    internal_kv._internal_kv_put(place.encode(), json.dumps(variables).encode(), overwrite=True, namespace=_NAMESPACE)
    atexit.register(_forget, place)


def _forget(place: str) -> None:
    if ray.is_initialized():
        internal_kv._internal_kv_del(place.encode(), namespace=_NAMESPACE)


def take() -> None:
    """Ray calls it as each worker process starts. Raises TimeoutError if the driver never left anything."""
    place, until = os.environ[_PLACE].encode(), time.monotonic() + _WAIT_S
    while (found := internal_kv._internal_kv_get(place, namespace=_NAMESPACE)) is None:
        if time.monotonic() > until:
            raise TimeoutError(f"no storage settings at {place.decode()} within {_WAIT_S:g} s: did the driver die?")
        time.sleep(0.05)
    os.environ.update(json.loads(found))
