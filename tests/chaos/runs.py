"""Training as a user starts it, a command of its own, to be disturbed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

STEPS, EVERY = 120, 10


@dataclass
class Run:
    """One `dico-ray train`. folder: of the run's files, which a test reads; settings: more of the command line."""

    folder: Path
    latents: str
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Run:
        settings = {
            "run.storage": self.folder.parent, "run.name": self.folder.name, "data.latents": self.latents,
            "data.window_samples": 64, "data.read_tasks": 1, "model.hidden_size": 8, "model.depths": "[1,1,1,1,1]",
            "model.num_classes": 10, "model.latent_size": 8, "train.global_batch": 16, "train.steps": STEPS,
            "train.lr": 1e-3, "train.precision": "fp32", "train.ema_decay": 0.9, "train.log_every": 1,
            "train.zero_stage": 2, "train.checkpoint_every": EVERY, "train.num_workers": 2,
            "resources.worker_cpus": 0.5, "resources.threads": 1, **self.settings,
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        env = {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **self.env}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dico_ray.cli", "train", *words], stdout=log, stderr=log, env=env
            )
        return self

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    def lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.folder / name).read_text()
        except (FileNotFoundError, OSError):
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    @property
    def step(self) -> int:
        metrics = self.lines("metrics.jsonl")
        return metrics[-1]["step"] if metrics else 0

    def losses(self) -> list[float]:
        metrics = self.lines("metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
        return [m["loss"] for m in metrics]

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := holds():
                return found
            assert self.process
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.tail()}"
            time.sleep(0.001)
        raise AssertionError(f"no {what} within {seconds:g} s:\n{self.tail()}")

    def until_step(self, step: int) -> int:
        return self.until(lambda: self.step >= step and self.step, f"step {step}")

    def workers(self) -> list[psutil.Process]:
        """Its training workers' processes, wherever they were started from."""
        found = []
        for process in psutil.process_iter():
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.pid)

    def end(self, seconds: float = 180) -> int:
        assert self.process
        return self.process.wait(seconds)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["event"] == "start"]


def kill_one(run: Run) -> None:
    os.kill(run.workers()[0].pid, signal.SIGKILL)
