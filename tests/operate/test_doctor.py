"""`dico-ray doctor` on a real cluster of two nodes: healthy, and with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def examine(nodes: Cluster, latents: Path, folder: Path, **settings: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what it said, and its JSON."""
    all_settings = {
        "run.storage": folder / "runs", "data.latents": latents, "model.latent_size": 8, "model.num_classes": 10,
        "model.hidden_size": 8, "model.depths": "[1,1,1,1,1]", "train.num_workers": 2, "train.global_batch": 16,
        "megabytes": 8, "json": folder / "found.json", **settings,
    }  # fmt: skip
    words = [word for name, value in all_settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "dico_ray.cli", "doctor", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "RAY_ADDRESS": nodes.address},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "found.json").read_text())


def test_a_healthy_cluster(nodes: Cluster, latents: Path, tmp_path: Path) -> None:
    code, said, found = examine(nodes, latents, tmp_path)
    # The disk or the shared memory of a test machine may be what it is.
    bad = [
        f for f in found["findings"] if f["verdict"] == "bad" and f["check"] not in ("shared memory", "disk", "memory")
    ]
    assert bad == [], said
    checks = {f["check"] for f in found["findings"]}
    assert checks >= {
        "version of torch", "version of dico_ray", "clock", "shared memory", "disk", "memory", "storage: write",
        "storage: read", "storage: list and remove", "storage: shared", "data set: readable", "data set: sample",
        "settings", "checkpoint", "CPUs for reading", "all-reduce (gloo)",
    }  # fmt: skip
    assert len({f["where"] for f in found["findings"] if f["check"] == "clock"}) == 2
    (link,) = [f for f in found["findings"] if f["check"] == "all-reduce (gloo)"]
    assert "between 2 workers on 2 nodes" in link["found"]
    assert code == (1 if found["verdicts"]["bad"] else 0)
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_faults_end_with_exit_code_1_and_what_to_do(nodes: Cluster, latents: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    code, said, found = examine(
        nodes, latents, tmp_path, **{"run.storage": tmp_path / "file", "train.num_workers": 4, "train.flip": "false",
                                     "data.latents": tmp_path / "nowhere", "timeout": 10},
    )  # fmt: skip
    assert code == 1
    by_check = {f["check"]: f for f in found["findings"]}
    for check in ("storage: write", "data set: sample", "settings", "checkpoint", "CPUs for reading"):
        assert by_check[check]["verdict"] == "bad", said
        assert by_check[check]["mend"] in said
    assert "checks are bad: " in said
