from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest

from dico_ray.operate import pods
from dico_ray.operate.groups import worker_groups
from tests.kuberay import config_for

LABELS = {pods.RUN: "trial"}
# Takes a second from the signal to its end, as training takes its time for a checkpoint.
DRIVER = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "committed").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "up").touch()
time.sleep(600)
"""


def templates(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a config's cluster, by part."""
    config = config_for(**sections)
    found = {group.name: pods.worker(config.cluster, group, LABELS) for group in worker_groups(config)}
    submit = pods.submitter(config.cluster, LABELS, ["ray", "job", "submit"])
    return found | {"head": pods.head(config.cluster, LABELS), "submitter": submit}


FULL: dict[str, Any] = {
    "spot": True, "data_nodes": [1, 2], "node_labels": {"gpu": "h100"}, "node_resources": {"rdma/ib": 8},
    "credentials_secret": "store", "service_account": "trainer", "storage_claim": "disk", "pull_secret": "registry",
}  # fmt: skip


@pytest.mark.parametrize("cluster", [{}, FULL], ids=["plain", "full"])
def test_every_pod_is_a_valid_pod_without_rights(cluster: dict[str, Any]) -> None:
    for part, template in templates(cluster=cluster).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": template["metadata"] | {"name": part}}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        rights = container["securityContext"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert (rights["readOnlyRootFilesystem"], rights["allowPrivilegeEscalation"]) == (True, False)
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def _terms(template: dict[str, Any]) -> list[Any]:
    affinity = template["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term["matchExpressions"] for term in affinity["nodeSelectorTerms"]]


def test_workers_go_to_spot_machines_and_the_head_never() -> None:
    found = templates(cluster=FULL | {"spot_label": "eks.amazonaws.com/capacityType=SPOT"})
    label = {"key": "eks.amazonaws.com/capacityType", "values": ["SPOT"]}
    for part in ("train", "data"):
        assert _terms(found[part]) == [[label | {"operator": "In"}]]
        assert {"key": label["key"], "operator": "Equal", "value": "SPOT", "effect": "NoSchedule"} in (
            found[part]["spec"]["tolerations"]
        )
    others = {"cloud.google.com/gke-spot": "true", "karpenter.sh/capacity-type": "spot",
              "kubernetes.azure.com/scalesetpriority": "spot"}  # fmt: skip
    for part in ("head", "submitter"):
        (avoided,) = _terms(found[part])
        assert avoided[0] == label | {"operator": "NotIn"}
        assert avoided[1:] == [{"key": k, "operator": "NotIn", "values": [v]} for k, v in others.items()]
        assert "tolerations" not in found[part]["spec"]
    assert "affinity" not in templates()["train"]["spec"]
    assert _terms(templates()["head"])[0][0]["operator"] == "NotIn", "also where this run asks for no spot machines"
    (avoided,) = _terms(templates(cluster={"spot_label": "example.com/spot=yes"})["head"])
    assert [e["key"] for e in avoided] == ["example.com/spot", "cloud.google.com/gke-spot",
                                           "eks.amazonaws.com/capacityType", *list(others)[1:]]  # fmt: skip


def test_devices_memory_and_labels_are_the_training_nodes() -> None:
    found = templates(cluster=FULL | {"node_memory_gb": 500, "shm_share": 0.5})
    (train,), (data,) = found["train"]["spec"]["containers"], found["data"]["spec"]["containers"]
    assert train["resources"]["limits"] == {"cpu": "96", "memory": "500G", "nvidia.com/gpu": "8", "rdma/ib": "8"}
    assert set(data["resources"]["limits"]) == {"cpu", "memory"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "250G"}} in found["train"]["spec"]["volumes"]
    assert found["train"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert "nodeSelector" not in found["data"]["spec"]


def test_credentials_come_by_reference() -> None:
    found = templates(cluster=FULL)
    for part in ("head", "train", "data"):
        assert found[part]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
        assert found[part]["spec"]["serviceAccountName"] == "trainer"
    submitter = found["submitter"]["spec"]["containers"][0]
    assert "envFrom" not in submitter
    assert {"secretKeyRef": {"name": "dico-ray-auth", "key": "auth_token"}} in [
        e.get("valueFrom") for e in submitter["env"]
    ]
    plain = templates(cluster={"auth": "disabled"})["submitter"]["spec"]["containers"][0]
    assert [variable["name"] for variable in plain["env"]] == ["HOME"]


def test_only_the_autoscaler_may_ask_kubernetes() -> None:
    for autoscale in (True, False):
        found = templates(cluster={"autoscale": autoscale})
        tokens = {part: template["spec"]["automountServiceAccountToken"] for part, template in found.items()}
        assert tokens == {"head": autoscale, "train": False, "submitter": False}


def test_a_hook_ends_before_its_pod_is_killed() -> None:
    for part, template in templates(cluster={"stop_wait_s": 300}).items():
        if part == "submitter":
            continue
        grace = template["spec"]["terminationGracePeriodSeconds"]
        script = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        waits = [
            int(number)
            for number in re.findall(r"-lt (\d+)|sleep (\d\d+)|timeout (\d+)", script)
            for number in number
            if number
        ]
        assert waits[0] in (300, 20)
        assert sum(waits) < grace


def test_the_patterns_find_our_commands_and_not_the_hook_itself() -> None:
    pattern = pods._DRIVERS
    for command in ("/opt/venv/bin/python /opt/venv/bin/dico-ray train --config x", "python jobs/train.py"):
        assert re.search(pattern, command)
    for command in ("ray::RayTrainWorker", "python -m ray.dashboard", " ".join(pods.stop_driver(600))):
        assert not re.search(pattern, command)
    assert not re.match("^ray::RayTrainWorker", " ".join(pods.drain_node(10, 10)))


@pytest.fixture
def unique() -> str:
    """A word that no other process of this machine has on its command line."""
    return uuid4().hex


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 180
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_head_waits_until_its_driver_has_committed(tmp_path: Path, unique: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), unique])
    try:
        _wait_for(tmp_path / "up")
        hook = pods.stop_driver(60, drivers=f"[{unique[0]}]{unique[1:]}", seen_s=0)
        waiter = subprocess.Popen(hook)  # a zombie would still be found: the driver is reaped as it ends
        assert driver.wait(timeout=180) == 143
        assert waiter.wait(timeout=180) == 0
        assert (tmp_path / "committed").exists()
    finally:
        driver.kill()
        driver.wait()


def test_a_driver_that_does_not_end_holds_the_head_for_so_long(tmp_path: Path, unique: str) -> None:
    deaf = DRIVER.replace("SIGTERM, stop", "SIGTERM, signal.SIG_IGN")
    driver = subprocess.Popen([sys.executable, "-c", deaf, str(tmp_path), unique])
    try:
        _wait_for(tmp_path / "up")
        began = time.monotonic()
        assert subprocess.run(pods.stop_driver(1, f"[{unique[0]}]{unique[1:]}", 0), check=False).returncode == 0
        assert time.monotonic() - began >= 1
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()


def test_a_head_without_a_driver_ends_at_once(unique: str) -> None:
    hook = pods.stop_driver(600, drivers=f"[{unique[0]}]{unique[1:]}", seen_s=600)
    assert subprocess.run(hook, check=False, timeout=180).returncode == 0
