"""What a node tells of itself. Runs on the node; judges nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import xxhash

import dico_ray

_PACKAGES = ("torch", "ray", "deepspeed", "numpy", "pyarrow", "safetensors")


def versions() -> dict[str, str]:
    """By package; 'missing' for what is not installed. dico_ray's with the hash of its code."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {"dico_ray": f"{dico_ray.__version__} ({_code_hash()})"}


def _code_hash() -> str:
    root, digest = Path(dico_ray.__file__).parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def of_this_node(session: str) -> dict[str, Any]:
    """session: Ray's folder on the node. Sizes in bytes."""
    shm, disk, memory = shutil.disk_usage("/dev/shm"), shutil.disk_usage(session), psutil.virtual_memory()
    return {
        "versions": versions(),
        "shm_free": shm.free,
        "shm_total": shm.total,
        "disk_free": disk.free,
        "disk_total": disk.total,
        "memory_free": memory.available,
        "memory_total": memory.total,
        "session": session,
        "cpus": len(os.sched_getaffinity(0)),
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> str | None:
    """Its report as XML; None where there is no such program, or it fails: then there is no driver."""
    if not shutil.which("nvidia-smi"):
        return None
    told = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, check=False, timeout=60)
    return told.stdout if told.returncode == 0 else None


def clock() -> float:
    return time.time()
