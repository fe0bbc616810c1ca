"""Each alert of cluster/prometheus/alerts.yaml, fired by provoking it in real runs that a real Prometheus watches."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.runs import Run
from tests.clusters import Cluster, until
from tests.clusters import cluster as start_cluster
from tests.watching import RULES, Prometheus, prometheus

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
RARELY = {"train.log_every": 10, "train.max_failed_saves": 10_000}


def impatient() -> dict[str, Any]:
    """The same rules, but for how long they wait: seconds where users have minutes."""
    text = re.sub(r"\+ \d+$", "+ 5", RULES.read_text(), flags=re.MULTILINE)
    rules = yaml.safe_load(text.replace("[10m]", "[8s]"))
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"
    return rules


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("r"), env={"RAY_metrics_report_interval_ms": "1000"}) as found:
        yield found


@pytest.fixture(scope="module")
def watch(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = cluster.temp / "prom_metrics_service_discovery.json"
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets, impatient()) as found:
        yield found


@pytest.fixture
def started(cluster: Cluster, latents: Path, tmp_path: Path) -> Iterator[Any]:
    """start(name, settings): a run on the cluster; it ends with the test."""
    runs: list[Run] = []

    def start(name: str, **settings: Any) -> Run:
        env = {**cluster.environment, "RAY_ADDRESS": cluster.gcs}
        runs.append(Run(tmp_path / name, str(latents), settings, env).start())
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def fires(watch: Prometheus, alert: str, run: str, seconds: float = 120) -> None:
    began = time.monotonic()
    until(lambda: (alert, run) in watch.firing(), f"alert {alert} (firing: {watch.firing()})", seconds)
    print(f"\n| {alert} | {time.monotonic() - began:.1f} |")


@contextmanager
def held_up(cluster: Cluster, word: str) -> Iterator[None]:
    """While the body runs, the first of the cluster's processes with that word may run a fifth of the time."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            caught = cluster.workers(word)[:1]
            for process in caught:
                process.send_signal(signal.SIGSTOP)
            over.wait(0.4)
            for process in caught:
                process.send_signal(signal.SIGCONT)
            over.wait(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_alerts_of_a_run_that_is_disturbed(cluster: Cluster, watch: Prometheus, started: Any) -> None:
    run: Run = started("disturbed", **{"train.steps": 100_000, "data.window_samples": 1024, **RARELY})
    run.until_step(20)
    fires(watch, "DicoRayGoodput", "disturbed")  # it has spent its time on starting
    for alert in ("DicoRayStalled", "DicoRayNotFinite", "DicoRayRestarts"):
        assert (alert, "disturbed") not in watch.firing()

    with held_up(cluster, "RayTrainWorker"):
        fires(watch, "DicoRayStraggler", "disturbed")

    checkpoints, aside = run.folder / "checkpoints", run.folder / "aside"
    checkpoints.rename(aside)
    checkpoints.write_text("in the way")
    fires(watch, "DicoRayCheckpointOld", "disturbed")
    assert any(event["event"] == "checkpoint failed" for event in run.lines("events.jsonl"))
    checkpoints.unlink()
    aside.rename(checkpoints)

    workers = cluster.workers("RayTrainWorker")
    for process in workers:
        process.suspend()
    fires(watch, "DicoRayStalled", "disturbed")
    for process in workers:
        process.resume()

    for _ in range(2):
        starts = len(run.starts())
        cluster.workers("RayTrainWorker")[0].kill()
        run.until(lambda before=starts: len(run.starts()) > before, "restart", 200)
    fires(watch, "DicoRayRestarts", "disturbed")


def test_the_alert_of_a_run_that_starves(cluster: Cluster, watch: Prometheus, started: Any) -> None:
    """Windows of one step each, from one read task that is held up."""
    run: Run = started("starving", **{"train.steps": 1000, "data.window_samples": 16, **RARELY})
    run.until_step(20)
    with held_up(cluster, "WindowReader"):
        fires(watch, "DicoRayStarving", "starving")


def test_the_alert_of_gradients_that_are_not_finite(watch: Prometheus, started: Any) -> None:
    started("wild", **{"train.lr": 1e30, "train.max_skipped_steps": 2, "train.max_failures": 2})
    fires(watch, "DicoRayNotFinite", "wild", 200)
