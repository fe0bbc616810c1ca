"""How fast workers add up tensors between them: an all-reduce through real Ray workers, by NCCL or gloo."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config
from dico_ray.operate.examine.findings import Finding, Verdict, good, unless

_TIMES = 5
_MEGABYTES = {"nccl": 256, "gloo": 16}
#             GB/s over the bus below which it is a warning, and bad: PCIe and 100 Gb/s links do better
_LEAST_GB_S = {"nccl": (10.0, 2.0), "gloo": (0.2, 0.02)}


class Peer:
    """One process of the group."""

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def all_reduce(self, rank: int, size: int, address: str, backend: str, timeout_s: float) -> float:
        """Seconds that one all-reduce takes, the fastest of some."""
        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if backend == "nccl" else "cpu")
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=timeout)
        try:
            numbers = torch.ones(_MEGABYTES[backend] * 1_000_000 // 4, device=device)
            fastest = float("inf")
            for _ in range(_TIMES + 1):  # the first one connects
                numbers.fill_(1.0)
                dist.barrier()
                began = time.monotonic()
                dist.all_reduce(numbers)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                fastest = min(fastest, time.monotonic() - began)
            if not bool((numbers == size).all()):
                raise RuntimeError("the sum is wrong")
            return fastest
        finally:
            dist.destroy_process_group()


def examine(config: Config, gpu: bool, timeout_s: float) -> Finding:
    """As many workers as training has at least, placed as Ray Train does; two where GPUs are not used."""
    backend = "nccl" if gpu else "gloo"
    size = config.train.worker_range[0] if gpu else min(2, config.train.worker_range[0])
    check = f"all-reduce ({backend})"
    if size == 1:
        return good(check, "", "one worker: nothing to add up")
    bundle = {"CPU": min(1.0, config.resources.worker_cpus), **({"GPU": 1.0} if gpu else {})}
    group = placement_group([bundle] * size, strategy="PACK" if gpu else "SPREAD")
    try:
        if not group.wait(timeout_s):
            return Finding(check, "", "unknown", f"no room for {size} workers of {bundle} within {timeout_s:g} s",
                           "stop other jobs, or wait for the autoscaler, and ask again")  # fmt: skip
        seconds, nodes = _measure(group, bundle, size, backend, timeout_s)
    except GetTimeoutError:
        return Finding(check, "", "bad", f"{size} workers did not finish within {timeout_s:g} s", _mend(backend))
    except RayError as error:
        return Finding(check, "", "bad", str(error).strip().splitlines()[-1], _mend(backend))
    finally:
        remove_placement_group(group)
    return judge(config, backend, size, nodes, max(seconds))


def _measure(
    group: Any, bundle: dict[str, float], size: int, backend: str, timeout_s: float
) -> tuple[list[float], int]:
    peer = ray.remote(Peer)
    peers: list[Any] = [
        peer.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(size)
    ]  # fmt: skip
    address = ray.get(peers[0].address.remote(), timeout=timeout_s)
    calls = [p.all_reduce.remote(rank, size, address, backend, timeout_s) for rank, p in enumerate(peers)]
    seconds = ray.get(calls, timeout=timeout_s)
    nodes = len(set(ray.util.placement_group_table(group)["bundles_to_node_id"].values()))
    return seconds, nodes


def judge(config: Config, backend: str, size: int, nodes: int, seconds: float) -> Finding:
    """Bus bandwidth as NCCL's tests define it: 2 (n - 1) / n of the bytes, over the time."""
    rate = 2 * (size - 1) / size * _MEGABYTES[backend] / 1e3 / seconds
    warn, bad = _LEAST_GB_S[backend]
    fault: Verdict | None = "bad" if rate < bad else "warning" if rate < warn else None
    # DeepSpeed adds gradients up in fp32 from stage 1 on, for weights in bf16 too.
    wide = 2 if config.train.precision == "bf16" and config.train.zero_stage == 0 else 4
    step = parameter_count(config.model) * wide * 2 * (size - 1) / size / 1e9 / rate
    text = f"{rate:.2f} GB/s between {size} workers on {nodes} nodes: a step's gradients take {step:.3f} s"
    return unless(fault, f"all-reduce ({backend})", "", text, _mend(backend))


def _mend(backend: str) -> str:
    if backend == "nccl":
        return "NCCL_DEBUG=INFO tells the path; see NCCL_SOCKET_IFNAME and NCCL_IB_HCA, NVLink, and that ports are open"
    return "see GLOO_SOCKET_IFNAME, and that the nodes reach each other's ports"
