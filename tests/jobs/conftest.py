"""One cluster for all tests of jobs, watched by a Prometheus while each verb runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from dico_ray.demo.digits import load_digits
from tests.clusters import Cluster
from tests.clusters import cluster as start_cluster
from tests.watching import Prometheus, binary, prometheus


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a worker node of two CPUs each, whose agents tell numbers every second."""
    with start_cluster(tmp_path_factory.mktemp("r"), env={"RAY_metrics_report_interval_ms": "1000"}) as found:
        yield found


@pytest.fixture(scope="module")
def watching(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """None where Prometheus is not installed: jobs can be tested without it."""
    with ExitStack() as stack:
        found = None
        if shutil.which("prometheus") or os.environ.get("CI") == "true":
            targets = cluster.temp / "prom_metrics_service_discovery.json"
            found = stack.enter_context(prometheus(tmp_path_factory.mktemp("prometheus"), targets))
        yield found


@pytest.fixture
def watch(watching: Prometheus | None) -> Prometheus:
    if watching is None:
        binary("prometheus")
    assert watching
    return watching


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file for a run of a few steps on forty digits, and their images."""
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
        "train": {"global_batch": 8, "steps": 200, "checkpoint_every": 50, "warmup_steps": 1, "log_every": 1},
        "sample": {"count": 20, "steps": 2, "batch_size": 10, "grid_rows": 2},
        "evaluate": {"reference": str(root / "digits")},
        "resources": {"actor_cpus": 2},  # by which images are read in processes of their own
    }
    (root / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return root


@pytest.fixture(scope="module")
def done(
    cluster: Cluster, watching: Prometheus | None, settings: Path
) -> dict[str, subprocess.CompletedProcess[str]]:  # fmt: skip
    """Every verb's job, one after the other, as they ended."""
    verbs = ("encode", "train", "sample", "evaluate")
    return {verb: cluster.submit(f"{verb}.py", "--config", str(settings / "run.yaml")) for verb in verbs}
