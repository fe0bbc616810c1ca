"""`dico-ray doctor`: examines a live cluster, storage and data set before GPUs are spent on them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dico_ray import cluster
from dico_ray.config import Config, UserError
from dico_ray.ingest import READ_TASK_CPUS
from dico_ray.operate.examine import content, facts, gpus, nodes, store, traffic
from dico_ray.operate.examine.findings import Finding, show, to_json
from dico_ray.storage import Storage

_CLOCK_TRIES = 5


class UnfitError(UserError):
    """Something would hurt a run."""


def main(
    config: Config, *, verbose: bool = False, json: str = "", megabytes: int = 64, chunks: int = 16,
    timeout: float = 120.0,
) -> None:  # fmt: skip
    """Prints the table. Raises UnfitError if something is bad."""
    cluster.connect(verbose)
    found = examine(config, megabytes, chunks, timeout)
    show(found)
    if json:
        about = {"run": config.run.folder, "data": config.data.latents, "time": time.time()}
        Path(json).write_text(to_json(found, about), encoding="utf-8")
    bad = [f for f in found if f.verdict == "bad"]
    if bad:
        where = ", ".join(dict.fromkeys(f"{f.check}{f' on {f.where}' if f.where else ''}" for f in bad))
        raise UnfitError(f"doctor: {len(bad)} of {len(found)} checks are bad: {where}")
    print(f"doctor: none of {len(found)} checks is bad")


def examine(config: Config, megabytes: int, chunks: int, timeout_s: float) -> list[Finding]:
    """megabytes: of each node's probe; chunks: of the data set that are read; timeout_s: for each examination."""
    examiners, found = _examiners(timeout_s)
    about, lost = _ask(examiners, "facts", timeout_s, lambda name: (examiners[name][1],))
    found += lost
    alive = {name: examiners[name] for name in about}
    resources = {_name(node): node["Resources"] for node in _nodes()}
    if alive:
        found += nodes.agreement(about)
        found += nodes.clocks({name: _skew(actor, timeout_s) for name, (actor, _) in alive.items()})
        found += nodes.room(about, {name: r.get("object_store_memory", 0.0) for name, r in resources.items()})
        found += gpus.judge(
            {name: told["nvidia_smi"] for name, told in about.items()},
            {name: r.get("GPU", 0.0) for name, r in resources.items()},
        )
        found += _storage(config, alive, megabytes, timeout_s)
    total = ray.cluster_resources()
    found += nodes.cpus_left(config, total.get("CPU", 0.0), total.get("GPU", 0.0), READ_TASK_CPUS)
    found += content.data_set(config, chunks)
    found.append(content.checkpoint(config))
    use_gpu = config.resources.accelerator != "cpu" and total.get("GPU", 0.0) > 0
    return [*found, traffic.examine(config, use_gpu, timeout_s)]


class Examiner:
    """Lives on a node and tells what is there."""

    def facts(self, session: str) -> dict[str, Any]:
        return facts.of_this_node(session)

    def clock(self) -> float:
        return facts.clock()

    def probe(self, run_storage: Storage, latents: Storage, token: str, megabytes: int) -> dict[str, Any]:
        return store.probe(run_storage, latents, token, megabytes)


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name(node: dict[str, Any]) -> str:
    """Its host, and the beginning of its id: a host can have several nodes."""
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"


def _examiners(timeout_s: float) -> tuple[dict[str, tuple[Any, str]], list[Finding]]:
    """An actor on each node with Ray's folder there, and findings about nodes that start none."""
    actor = ray.remote(Examiner)
    started: dict[str, tuple[Any, str]] = {}
    for node in _nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        session = str(Path(node["ObjectStoreSocketName"]).parents[1])
        started[_name(node)] = (actor.options(num_cpus=0, scheduling_strategy=here).remote(), session)
    times, lost = _ask(started, "clock", timeout_s, lambda name: ())
    return {name: started[name] for name in times}, lost


def _ask(
    examiners: Mapping[str, tuple[Any, str]], method: str, timeout_s: float, arguments: Any
) -> tuple[dict[str, Any], list[Finding]]:
    """Every node's answer to one method, all at a time; findings about those that gave none."""
    calls = {name: getattr(actor, method).remote(*arguments(name)) for name, (actor, _) in examiners.items()}
    answers: dict[str, Any] = {}
    lost = []
    until = time.monotonic() + timeout_s
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=max(0.1, until - time.monotonic()))
        except RayError as error:  # GetTimeoutError is one
            text = (str(error).strip() or type(error).__name__).splitlines()[-1]
            mend = "see the node's logs (`ray logs`), and that its image has this dico_ray"
            lost.append(Finding(f"node: {method}", name, "bad", f"no answer within {timeout_s:g} s: {text}", mend))
    return answers, lost


def _skew(actor: Any, timeout_s: float) -> tuple[float, float]:
    """Seconds that a node's clock is ahead, and half the shortest round trip, which it is known to."""
    seen = []
    for _ in range(_CLOCK_TRIES):
        began = time.time()
        there: Any = ray.get(actor.clock.remote(), timeout=timeout_s)
        ended = time.time()
        seen.append(((ended - began) / 2, there - (began + ended) / 2))
    error, skew = min(seen)
    return skew, error


def _storage(config: Config, alive: Mapping[str, tuple[Any, str]], megabytes: int, timeout_s: float) -> list[Finding]:
    """Each node writes and reads at the same time, as in training; and reads what this process wrote."""
    storage, token = Storage(config.run.storage), f"token-{uuid4().hex}"
    folder = storage.at(store.PROBES)
    try:
        folder.write(token, token.encode())
    except (UserError, OSError) as error:
        mend = "see run.storage, and the credentials of the machine that this command runs on"
        return [Finding("storage: write", "this command", "bad", str(error), mend)]
    try:
        arguments = (storage, Storage(config.data.latents), token, megabytes)
        told, lost = _ask(alive, "probe", timeout_s, lambda name: arguments)
    finally:
        folder.remove(token)
    return [*store.judge(told, config.run.storage, config.data.latents), *lost]
