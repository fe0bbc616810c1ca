"""Pod templates of a rendered cluster: what runs in them, with which rights, and how they end."""

from __future__ import annotations

from typing import Any

from dico_ray.config import Cluster
from dico_ray.operate.groups import Group

CONFIG_FOLDER, CONFIG_FILE = "/etc/dico-ray", "run.yaml"
# Our own labels: KubeRay finds its pods by app.kubernetes.io/*, and a value of ours there would hide them from it.
RUN, PART = "dico-ray/run", "dico-ray/part"
USER = 1000
# A pod's last words: its hook gets this much less than its grace period, for Ray's own processes to end in.
_MARGIN_S = 60
# The controller asks for a job's state every three seconds: a head that stays so long is seen to have failed.
_SEEN_S = 15
# Labels of spot nodes by GKE, EKS, Karpenter and AKS. Head and submitter avoid all: spot_label is one cloud's.
_SPOT_LABELS = (
    "cloud.google.com/gke-spot=true",
    "eks.amazonaws.com/capacityType=SPOT",
    "karpenter.sh/capacity-type=spot",
    "kubernetes.azure.com/scalesetpriority=spot",
)
# Commands of this project; the brackets keep the pattern from finding the shell that holds it.
_DRIVERS = r"[d]ico-ray (encode|train|sample|evaluate|sweep)|[j]obs/[a-z]+\.py"

Pod = dict[str, Any]


def stop_driver(wait_s: int, drivers: str = _DRIVERS, seen_s: int = _SEEN_S) -> list[str]:
    """The head's last command: asks the run's command to stop, and waits until it has committed a checkpoint.

    The job then *fails* (exit code 143), and KubeRay tries it again; `ray job stop` would make it *stopped*, which
    KubeRay takes for an end. Without a running command it returns at once.
    """
    return _shell(
        f"pkill -TERM -f '{drivers}' || exit 0",
        f"n=0; while [ $n -lt {wait_s} ] && pgrep -f '{drivers}' > /dev/null; do sleep 1; n=$((n+1)); done",
        f"sleep {seen_s}",
    )


def drain_node(notice_s: int, wait_s: int, workers: str = "^ray::RayTrainWorker") -> list[str]:
    """A worker's last command: tells Ray that its node goes (its own node, where no id is given), so that training
    commits a checkpoint and goes on elsewhere; then waits until no training worker is left on the node.
    """
    return _shell(
        "timeout 20 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION "
        f"--reason-message 'the pod is being ended' --deadline-remaining-seconds {notice_s} || true",
        f"n=0; while [ $n -lt {wait_s} ] && pgrep -f '{workers}' > /dev/null; do sleep 1; n=$((n+1)); done",
    )


def _shell(*lines: str) -> list[str]:
    return ["/bin/sh", "-c", "\n".join(lines)]


def head(cluster: Cluster, labels: dict[str, str]) -> Pod:
    """The head's pod: GCS, dashboard, the run's command; never on a spot machine."""
    container = _container(cluster, "head", cluster.head_cpus, cluster.head_memory_gb)
    container["ports"] = _ports(gcs=6379, dashboard=8265, client=10001, metrics=8080)
    container["lifecycle"] = _before_end(stop_driver(cluster.stop_wait_s))
    container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    spec = _spec(cluster, container, cluster.head_memory_gb)
    spec["volumes"].append({"name": "config", "configMap": {"name": labels[RUN]}})
    spec["affinity"] = {"nodeAffinity": _required(_no_spot(cluster))}
    # The autoscaler, beside the head's container, asks Kubernetes for pods.
    spec["automountServiceAccountToken"] = cluster.autoscale
    return {"metadata": {"labels": labels | {PART: "head"}}, "spec": spec}


def worker(cluster: Cluster, group: Group, labels: dict[str, str]) -> Pod:
    """A training or data node's pod."""
    devices = {"nvidia.com/gpu": group.gpus} if group.gpus else {}
    if group.name == "train":
        devices |= cluster.node_resources
    container = _container(cluster, group.name, group.cpus, group.memory_gb, devices)
    container["ports"] = _ports(metrics=8080)
    notice = cluster.spot_notice_s if cluster.spot else cluster.stop_wait_s
    container["lifecycle"] = _before_end(drain_node(notice, cluster.stop_wait_s))
    spec = _spec(cluster, container, group.memory_gb)
    spec["automountServiceAccountToken"] = False
    if group.name == "train" and cluster.node_labels:
        spec["nodeSelector"] = dict(cluster.node_labels)
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if group.gpus else []
    if cluster.spot:
        key, _, value = cluster.spot_label.partition("=")
        spec["affinity"] = {"nodeAffinity": _required([_expression(cluster.spot_label, "In")])}
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    if tolerations:
        spec["tolerations"] = tolerations
    return {"metadata": {"labels": labels | {PART: group.name}}, "spec": spec}


def submitter(cluster: Cluster, labels: dict[str, str], command: list[str] | None = None) -> Pod:
    """The pod that submits a job and follows its log; KubeRay writes command and token, unless they are given."""
    limits = {"cpu": "500m", "memory": "1G"}
    container: dict[str, Any] = {
        "name": "submit",
        "image": cluster.image,
        **({"command": command} if command else {}),
        "env": [{"name": "HOME", "value": "/tmp"}, *(_token(cluster) if command else [])],
        "resources": {"requests": limits, "limits": limits},
        "securityContext": container_rights(),
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_rights(),
        **_pull(cluster),
        "affinity": {"nodeAffinity": _required(_no_spot(cluster))},
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1G"}}],
    }
    return {"metadata": {"labels": labels | {PART: "submitter"}}, "spec": spec}


def _token(cluster: Cluster) -> list[dict[str, Any]]:
    if cluster.auth == "disabled":
        return []
    secret = {"secretKeyRef": {"name": cluster.auth_secret, "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]


def container_rights() -> dict[str, Any]:
    """No root, no new rights, no capabilities (IPC_LOCK neither), a root file system that cannot be written."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def _pod_rights() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(
    cluster: Cluster, name: str, cpus: float, memory_gb: int, devices: dict[str, int] | None = None
) -> dict[str, Any]:
    amounts = {"cpu": f"{cpus:g}", "memory": f"{memory_gb}G", **{k: str(v) for k, v in (devices or {}).items()}}
    values = {"HOME": "/scratch", **cluster.env}
    container: dict[str, Any] = {
        "name": f"ray-{name}",
        "image": cluster.image,
        "env": [{"name": key, "value": value} for key, value in values.items()],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": container_rights(),
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},
            {"name": "scratch", "mountPath": "/scratch", "subPath": "home"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if cluster.credentials_secret:
        container["envFrom"] = [{"secretRef": {"name": cluster.credentials_secret}}]
    if cluster.storage_claim:
        container["volumeMounts"].append({"name": "storage", "mountPath": cluster.storage_path})
    return container


def _spec(cluster: Cluster, container: dict[str, Any], memory_gb: int) -> dict[str, Any]:
    shm = max(1, round(memory_gb * cluster.shm_share))
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.stop_wait_s + _MARGIN_S,
        "securityContext": _pod_rights(),
        **_pull(cluster),
        **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
        "containers": [container],
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": f"{cluster.scratch_gb}G"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}G"}},
        ],
    }
    if cluster.storage_claim:
        spec["volumes"].append({"name": "storage", "persistentVolumeClaim": {"claimName": cluster.storage_claim}})
    return spec


def _pull(cluster: Cluster) -> dict[str, Any]:
    return {"imagePullSecrets": [{"name": cluster.pull_secret}]} if cluster.pull_secret else {}


def _ports(**ports: int) -> list[dict[str, Any]]:
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _before_end(command: list[str]) -> dict[str, Any]:
    return {"preStop": {"exec": {"command": command}}}


def _no_spot(cluster: Cluster) -> list[dict[str, Any]]:
    """All of them hold in one term; a node without the label passes."""
    return [_expression(label, "NotIn") for label in dict.fromkeys((cluster.spot_label, *_SPOT_LABELS))]


def _expression(label: str, operator: str) -> dict[str, Any]:
    key, _, value = label.partition("=")
    return {"key": key, "operator": operator, "values": [value]}


def _required(expressions: list[dict[str, Any]]) -> dict[str, Any]:
    terms = [{"matchExpressions": expressions}]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
