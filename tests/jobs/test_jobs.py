"""The scripts in jobs/ through `ray job submit`, against a `ray start --head` of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from dico_ray.demo.digits import load_digits

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    environment: dict[str, str]

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, waiting for the job; its log is in stdout."""
        words = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", str(ROOT / "jobs"), "--"]
        return subprocess.run(
            [*words, sys.executable, *command], env=self.environment, capture_output=True, text=True, check=False
        )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node with a dashboard, on ports of its own; its processes are ended by their group, and no others."""
    port, dashboard = _free_port(), _free_port()
    temp = tmp_path_factory.mktemp("r")
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={port}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={_free_port()}",
    ]  # fmt: skip
    log = (temp / "head.log").open("w")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    found = Cluster(f"http://127.0.0.1:{dashboard}", environment)
    try:
        _wait_for(found, head, temp)
        yield found
    finally:
        import psutil

        family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        head.wait(timeout=60)
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()


def _wait_for(cluster: Cluster, head: subprocess.Popen[bytes], temp: Path) -> None:
    """Until a job that does nothing succeeds: the dashboard answers before the agent that starts jobs does."""
    deadline = time.monotonic() + 180
    while (trial := cluster.submit("-c", "pass")).returncode != 0:
        logs = [temp / "head.log", *temp.glob("session_latest/logs/dashboard_agent*")]
        said = "\n".join(f"{log}: {log.read_text()[-2000:]}" for log in logs)
        assert head.poll() is None, said
        assert time.monotonic() < deadline, f"no job within 180 s: {trial.stdout[-1000:]}{trial.stderr[-1000:]}\n{said}"
        time.sleep(1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file for a run of four steps on forty digits, and their images."""
    root = tmp_path_factory.mktemp("job")
    pixels, labels = load_digits()
    for label in range(10):
        (root / "digits" / str(label)).mkdir(parents=True)
        for i, image in enumerate(pixels[labels == label][:4]):
            Image.fromarray(image).save(root / "digits" / str(label) / f"{i}.png")
    config = {
        "recipe": "tiny-cpu",
        "run": {"storage": str(root / "runs"), "name": "job"},
        "model": {"hidden_size": 8, "depths": [1] * 5},
        "data": {"latents": str(root / "latents"), "window_samples": 16},
        "encode": {"images": str(root / "digits"), "shard_samples": 20},
        "train": {"global_batch": 8, "steps": 4, "warmup_steps": 1, "log_every": 1},
        "sample": {"count": 20, "steps": 2, "batch_size": 10, "grid_rows": 2},
        "evaluate": {"reference": str(root / "digits")},
    }
    (root / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return root


def test_every_verb_runs_as_a_job(cluster: Cluster, settings: Path) -> None:
    for verb in ("encode", "train", "sample", "evaluate"):
        job = cluster.submit(f"{verb}.py", "--config", str(settings / "run.yaml"))
        assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-1000:]
        assert "succeeded" in job.stdout + job.stderr
    run = settings / "runs" / "job"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len(list((run / "samples" / "images").rglob("*.png"))) == 20
    assert json.loads((run / "evaluation.json").read_text())["frechet_distance"] > 0


def test_a_job_with_a_wrong_setting_fails_with_its_line(cluster: Cluster, settings: Path) -> None:
    job = cluster.submit("train.py", "--config", str(settings / "run.yaml"), "--train.zero_stagee", "2")
    assert job.returncode != 0
    assert "--train.zero_stagee is not a setting; did you mean train.zero_stage?" in job.stdout


def test_the_scripts_are_thin() -> None:
    for script in (ROOT / "jobs").glob("*.py"):
        assert len(script.read_text().splitlines()) <= 25
