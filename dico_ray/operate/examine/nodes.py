"""Judges what the nodes tell of themselves, and whether they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dico_ray.config import Config
from dico_ray.operate.examine.findings import Finding, Verdict, good, unless

_SKEW_S = (0.5, 5.0)  # a warning, bad: stores refuse requests dated minutes off, logs lose their order long before
_DISK_USED = (0.85, 0.95)  # at 95% Ray makes no objects on a node (its local_fs_capacity_threshold)
_MEMORY_USED = (0.80, 0.92)  # at 95% Ray's memory monitor kills workers
_HARMLESS = frozenset({"numpy", "pyarrow", "safetensors"})

Nodes = Mapping[str, Mapping[str, Any]]  # facts.of_this_node, by the node's name


def agreement(nodes: Nodes) -> list[Finding]:
    """One finding a package: all nodes have the same version of it."""
    found = []
    for package in next(iter(nodes.values()))["versions"]:
        by_node = {name: facts["versions"][package] for name, facts in nodes.items()}
        counted = Counter(by_node.values()).most_common()
        if len(counted) == 1 and counted[0][0] != "missing":
            found.append(good(f"version of {package}", "", counted[0][0]))
            continue
        others = ", ".join(f"{name} has {v}" for name, v in by_node.items() if v != counted[0][0])
        text = f"{counted[0][0]} on {counted[0][1]} of {len(nodes)} nodes" + (f"; {others}" if others else "")
        fault: Verdict = "warning" if package in _HARMLESS else "bad"
        found.append(
            Finding(f"version of {package}", "", fault, text, f"give all nodes one image with the same {package}")
        )
    return found


def _level(value: float, limits: tuple[float, float]) -> Verdict | None:
    return "bad" if value > limits[1] else "warning" if value > limits[0] else None


def clocks(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """skews: seconds that a node's clock is ahead of this one's, and how exactly that is known (half a round trip)."""
    return [
        unless(
            _level(max(0.0, abs(skew) - error), _SKEW_S), "clock", name, f"{skew:+.3f} s off, known to {error:.3f} s",
            "let chrony or the cloud's time service set the node's clock",
        )
        for name, (skew, error) in skews.items()
    ]  # fmt: skip


def room(nodes: Nodes, object_stores: Mapping[str, float]) -> list[Finding]:
    """Shared memory, disk and memory of each node. object_stores: bytes that Ray was given for objects."""
    found = []
    for name, facts in nodes.items():
        store = object_stores.get(name, 0.0)
        found += [
            unless(
                "bad" if facts["shm_total"] < store else None, "shared memory", name,
                f"/dev/shm has {_gb(facts['shm_total'])}, Ray's object store {_gb(store)}",
                f"mount an emptyDir of medium Memory with {_gb(1.1 * store)} at /dev/shm (docker: --shm-size), or "
                "lower --object-store-memory: Ray puts objects on disk otherwise",
            ),
            _used("disk", name, facts["disk_free"], facts["disk_total"], _DISK_USED, f"at {facts['session']}",
                  "free some, or give Ray's --temp-dir a larger disk: Ray makes no objects on a full one"),
            _used("memory", name, facts["memory_free"], facts["memory_total"], _MEMORY_USED, "on the node",
                  "stop what else runs there: Ray kills workers when 95% is taken"),
        ]  # fmt: skip
    return found


def _used(
    check: str, name: str, free: float, total: float, limits: tuple[float, float], where: str, mend: str
) -> Finding:
    used = 1 - free / total
    text = f"{_gb(free)} free of {_gb(total)} {where}, {used:.0%} used"
    return unless(_level(used, limits), check, name, text, mend)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def cpus_left(config: Config, cpus: float, gpus: float, task_cpus: float) -> list[Finding]:
    """Whether workers find GPUs and CPUs, and read tasks CPUs beside them. cpus, gpus: of the whole cluster."""
    workers, each = config.train.worker_range[0], config.resources.worker_cpus
    left, wanted = cpus - workers * each, config.data.read_tasks * task_cpus
    fault: Verdict | None = "bad" if left < task_cpus else "warning" if left < wanted else None
    found = [
        unless(
            fault, "CPUs for reading", "",
            f"{cpus:g} CPUs, {workers} workers take {workers * each:g}: {max(left, 0.0):g} left, "
            f"{config.data.read_tasks} read tasks want {wanted:g}",
            "lower resources.worker_cpus or train.num_workers, or add a CPU node: without CPUs no batch comes",
        )
    ]  # fmt: skip
    if gpus or config.resources.accelerator == "gpu":
        text = f"{gpus:g} GPUs for {workers} workers"
        fault = "bad" if gpus < workers else None
        found.append(unless(fault, "GPUs", "", text, "add GPU nodes, or lower train.num_workers"))
    return found
