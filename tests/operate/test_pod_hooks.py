"""The pods' last commands, and token authentication, against a real `ray start --head`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from dico_ray.operate import pods

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))
# Commits five seconds after it is asked to stop: later than Ray would wait by itself.
DRIVER = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(5)
    pathlib.Path(sys.argv[1], "committed").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "up").touch()
time.sleep(600)
"""


@dataclass(frozen=True)
class Head:
    dashboard: str
    environment: dict[str, str]

    def run(self, *command: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in self.environment.items() if token or not k.startswith("RAY_AUTH")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)

    def job(self, action: str, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(RAY, "job", action, "--address", self.dashboard, *words, token=token)

    def status(self, job: str, wanted: str) -> None:
        """Waits until a job has a state."""
        deadline = time.monotonic() + 180
        while wanted not in (said := self.job("status", job)).stdout + said.stderr:
            assert time.monotonic() < deadline, said.stdout + said.stderr
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head node that asks for a token, on ports of its own; only its own processes are ended."""
    port, dashboard, temp = _free_port(), _free_port(), tmp_path_factory.mktemp("h")
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex * 2, "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={_free_port()}",
    ]  # fmt: skip
    with (temp / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    found = Head(f"http://127.0.0.1:{dashboard}", environment)
    try:
        deadline = time.monotonic() + 180
        while (trial := found.job("submit", "--", "true")).returncode:
            assert process.poll() is None, (temp / "head.log").read_text()
            assert time.monotonic() < deadline, trial.stdout + trial.stderr
            time.sleep(1)
        yield found
    finally:
        # A drained node takes half a minute to leave by itself, and nothing in it is needed any more.
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait(timeout=60)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _start(head: Head, folder: Path, name: str, *options: str) -> str:
    """Submits the driver as a rendered job does, and waits until it runs; a word of its command line comes back."""
    word = uuid4().hex
    (folder / "driver.py").write_text(DRIVER)
    wait = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    done = head.job(
        "submit", "--no-wait", "--submission-id", name, "--runtime-env-json", wait, *options, "--",
        "exec", sys.executable, str(folder / "driver.py"), str(folder), word,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 180
    while not (folder / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return word


def test_a_head_that_ends_leaves_a_failed_job_which_has_committed(head: Head, tmp_path: Path) -> None:
    """KubeRay tries failed jobs again."""
    word = _start(head, tmp_path, "first")
    hook = pods.stop_driver(60, drivers=f"[{word[0]}]{word[1:]}", seen_s=0)
    assert head.run(*hook).returncode == 0
    assert (tmp_path / "committed").exists(), "the hook returned before the driver had committed"
    head.status("first", "failed")


def test_a_stopped_job_has_time_to_commit(head: Head, tmp_path: Path) -> None:
    _start(head, tmp_path, "second")
    head.job("stop", "second")
    head.status("second", "stopped")
    assert (tmp_path / "committed").exists()


def test_without_the_token_nobody_submits(head: Head) -> None:
    told = head.job("submit", "--", "true", token=False)
    assert told.returncode != 0
    assert "token" in (told.stdout + told.stderr).lower()


def test_a_worker_that_ends_drains_its_own_node(head: Head, tmp_path: Path) -> None:
    """The node is not idle, as one that trains: an idle one would leave by itself."""
    _start(head, tmp_path, "third", "--entrypoint-num-cpus", "1")
    done = head.run(*pods.drain_node(300, 300, workers=f"^{uuid4().hex}"))
    assert done.returncode == 0, done.stdout + done.stderr
    look = (
        "import ray; from ray._private.state import state; "
        "ray.init(log_to_driver=False); own = ray.get_runtime_context().get_node_id(); "
        "print('draining', own in state.get_draining_nodes())"
    )
    told = head.run(sys.executable, "-c", look)
    assert "draining True" in told.stdout, told.stdout + told.stderr + done.stderr
