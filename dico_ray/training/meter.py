"""A step's numbers, collected on the device and asked for only when they are logged."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from dico_ray import accelerators
from dico_ray.arithmetic import training_flops
from dico_ray.config import Config
from dico_ray.training.engine import Engine
from dico_ray.training.phases import Phases


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its name: what MFU is measured against. None if it is not in the table."""
    found = accelerators.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found.peak_flops if found else None


class Meter:
    """One rank's. Every rank flushes at the same steps; all get the same metrics."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._phases = Phases(engine.device)
        engine.phase = self._phases
        self._flops, self._peak = training_flops(config.model), peak_flops(engine.device)
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._steps = 0
        self._began = self._asked = time.perf_counter()
        self._waited = self._stalled = 0.0

    def batch_arrived(self) -> None:
        self._waited += time.perf_counter() - self._asked

    def add(self, losses: Tensor, norm: Tensor, skipped: bool) -> None:
        """losses: (3,) this rank's loss, mse, vb; norm: (). A skipped step's numbers are not finite, and left out."""
        self._steps += 1
        if not skipped:
            self._losses.append(losses)
            self._norms.append(norm)
        self._asked = time.perf_counter()

    def checkpoint_done(self) -> None:
        now = time.perf_counter()
        self._stalled += now - self._asked
        self._asked = now

    def left_out(self, began: float) -> None:
        """What happened since `began` (by perf_counter) counts neither as a step's time nor as a stall."""
        gone = time.perf_counter() - began
        self._began += gone
        self._asked += gone

    def flush(self, step: int, lr: float) -> dict[str, Any]:
        """Means over the steps since the last flush; none if none of them was finite."""
        if not self._losses:
            self._reset()
            return {}
        norms = torch.stack(self._norms)
        local = torch.cat([torch.stack(self._losses).mean(0), norms.mean()[None]])
        loss, mse, vb, norm = self._engine.mean(local)
        span = time.perf_counter() - self._began
        count = self._steps
        train, workers = self._config.train, self._engine.world_size
        rate = count * train.global_batch / span
        phases = {name: seconds / count for name, seconds in self._phases.flush().items()}
        ranks = self._engine.gather([self._waited / span, phases.get("draw", 0.0) + phases.get("forward", 0.0)])
        waits, own = [r[0] for r in ranks], [r[1] for r in ranks]
        slowest = max(range(workers), key=own.__getitem__)
        tflops = rate * self._flops / workers / 1e12
        gpu = self._engine.device.type == "cuda"
        metrics = {
            "step": step, "loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "grad_norm_max": float(norms.max()),
            "lr": lr, "images_per_s": rate, "step_s": span / count,
            **{f"{name}_s": seconds for name, seconds in phases.items()},
            "data_wait": max(waits), "checkpoint_stall_s": self._stalled,
            "rank_skew": own[slowest] / (sum(own) / workers) if sum(own) else 1.0, "slowest_rank": slowest,
            "tflops_per_worker": tflops, **({"mfu": tflops * 1e12 / self._peak} if self._peak else {}),
            **({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if gpu else {}),
            "skipped_steps": self._engine.skipped_steps, "workers": workers,
            "epoch_images": step * train.global_batch,
        }  # fmt: skip
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._losses, self._norms, self._steps = [], [], 0
        self._began = self._asked = time.perf_counter()
        self._waited = self._stalled = 0.0
