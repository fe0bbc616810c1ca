"""A real Ray cluster for tests: `ray start --head` and a worker node, on ports of their own, and jobs on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
START_S = 180


@dataclass(frozen=True)
class Cluster:
    """dashboard: its URL; gcs: what RAY_ADDRESS takes; temp: the head's folder; nodes: the `ray start` processes."""

    dashboard: str
    gcs: str
    temp: Path
    environment: dict[str, str]
    nodes: tuple[subprocess.Popen[bytes], ...]

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's command line that takes --address."""
        return subprocess.run(
            [RAY, *words], env=self.environment | {"RAY_ADDRESS": self.dashboard}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, waiting for the job unless told not to; its log is in stdout."""
        return self.ray("job", "submit", "--working-dir", str(ROOT / "jobs"), *options, "--", sys.executable, *command)

    def family(self) -> list[psutil.Process]:
        """All processes of its nodes."""
        alive = [node for node in self.nodes if node.poll() is None]
        return [child for node in alive for child in psutil.Process(node.pid).children(recursive=True)]

    def files(self) -> list[Path]:
        """All that its nodes have written."""
        folders = [self.temp, *self.temp.parent.glob(f"{self.temp.name}?")]
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    def workers(self, word: str) -> list[psutil.Process]:
        """Its processes with that word in the command line."""
        found = []
        for process in self.family():
            try:
                found += [process] if word in " ".join(process.cmdline()) else []
            except psutil.Error:
                continue
        return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def cluster(temp: Path, cpus: int = 2, workers: int = 1, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A head with a dashboard, and worker nodes. Its processes are ended one by one, and no others."""
    port, dashboard = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    environment |= env or {}
    nodes: list[subprocess.Popen[bytes]] = []
    found = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", temp, environment, ())

    def start(name: str, *words: str) -> None:
        command = [
            RAY, "start", "--block", f"--num-cpus={cpus}", "--disable-usage-stats", "--object-store-memory=200000000",
            f"--dashboard-agent-listen-port={free_port()}", *words,
        ]  # fmt: skip
        with (temp / f"{name}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        start("head", "--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}",
              f"--temp-dir={temp}")  # fmt: skip
        _await_job(found, nodes[0])
        for number in range(workers):
            # Two nodes that share a folder remove each other's copies of a job's working directory.
            start(f"worker-{number}", f"--address={found.gcs}", f"--temp-dir={temp}{number}")
        found = Cluster(found.dashboard, found.gcs, temp, environment, tuple(nodes))
        _await_nodes(found, workers + 1)
        yield found
    finally:
        family = [child for node in nodes if node.poll() is None for child in psutil.Process(node.pid).children(True)]
        for process in [*nodes, *family]:  # nothing of theirs outlives the test, so they need not tidy up
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
        for node in nodes:
            node.wait(timeout=60)


def _await_job(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    """Until a job that does nothing succeeds: the dashboard answers before the agent that starts jobs does."""
    deadline = time.monotonic() + START_S
    while (trial := cluster.submit("-c", "pass")).returncode != 0:
        logs = [cluster.temp / "head.log", *cluster.temp.glob("session_latest/logs/dashboard_agent*")]
        said = "\n".join(f"{log}: {log.read_text()[-2000:]}" for log in logs)
        assert head.poll() is None, said
        assert time.monotonic() < deadline, f"no job in time: {trial.stdout[-1000:]}{trial.stderr[-1000:]}\n{said}"
        time.sleep(1)


def _await_nodes(cluster: Cluster, count: int) -> None:
    deadline = time.monotonic() + START_S
    while (listed := cluster.ray("list", "nodes", "--format", "json").stdout).count('"ALIVE"') < count:
        assert time.monotonic() < deadline, f"no {count} nodes in time: {listed}"
        time.sleep(1)


def until(holds: Any, what: str, seconds: float = 240) -> Any:
    """Waits for the first true answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what} within {seconds:g} s")
