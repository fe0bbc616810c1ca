"""The Kubernetes objects of a run, as plain data: RayJob or RayCluster and what protects it, or a CronJob."""

from __future__ import annotations

import json
from typing import Any

import yaml

from dico_ray.config import Cluster, Config, ConfigError
from dico_ray.operate import pods
from dico_ray.operate.groups import Group, worker_groups
from dico_ray.operate.pod_settings import kubernetes_name, settings_for_pods

Manifest = dict[str, Any]

TRAIN = "train"
VERBS = ("encode", TRAIN, "sample", "evaluate")
_CONFIG = f"{pods.CONFIG_FOLDER}/{pods.CONFIG_FILE}"
_DASHBOARD, _METRICS = 8265, (8080, 44217, 44227)  # metrics: nodes, autoscaler, dashboard


def job(config: Config, verb: str = TRAIN) -> list[Manifest]:
    """A RayJob that runs one verb, its settings, and what protects it."""
    suffix, cluster = "" if verb == TRAIN else f"-{verb}", config.cluster
    name = kubernetes_name(config, 47 - len(suffix)) + suffix
    labels = {pods.RUN: name}
    spec = {
        "entrypoint": f"exec dico-ray {verb} --config {_CONFIG}",
        "runtimeEnvYAML": yaml.safe_dump(_runtime_env(cluster)),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": pods.submitter(cluster, labels),
        # KubeRay tries failed jobs again, never stopped ones; each attempt has a Ray cluster of its own.
        "backoffLimit": cluster.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.keep_s,
        "rayClusterSpec": _cluster_spec(config, labels),
    }
    return [*_around(config, name, labels), _object("ray.io/v1", "RayJob", name, labels | _queue(cluster), spec=spec)]


def ray_cluster(config: Config) -> list[Manifest]:
    """A RayCluster that stays, for jobs that are submitted to it, its settings, and what protects it."""
    name = kubernetes_name(config, 53)
    labels = {pods.RUN: name}
    spec = _cluster_spec(config, labels)
    named = _object("ray.io/v1", "RayCluster", name, labels | _queue(config.cluster), spec=spec)
    return [*_around(config, name, labels), named]


def cron(config: Config) -> list[Manifest]:
    """A CronJob that submits sampling and evaluation to the cluster that `ray_cluster` describes."""
    name, cluster = kubernetes_name(config, 43), config.cluster
    for setting in ("reference", "features"):
        if not getattr(config.evaluate, setting):
            raise ConfigError(f"evaluate.{setting}: unset, and the evaluation needs it; set it")
    labels = {pods.RUN: name}
    command = [
        "ray", "job", "submit", "--address", f"http://{name}-head-svc:{_DASHBOARD}",
        "--runtime-env-json", json.dumps(_runtime_env(cluster)), "--",
        "sh", "-c", f"dico-ray sample --config {_CONFIG} && dico-ray evaluate --config {_CONFIG}",
    ]  # fmt: skip
    spec = {
        "schedule": cluster.evaluate_schedule,
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": {"backoffLimit": 0, "template": pods.submitter(cluster, labels, command)}},
    }
    return [_object("batch/v1", "CronJob", f"{name}-evaluate", labels, spec=spec)]


def _cluster_spec(config: Config, labels: dict[str, str]) -> Manifest:
    cluster = config.cluster
    spec: Manifest = {"rayVersion": cluster.ray_version}
    if cluster.auth == "token":
        spec["authOptions"] = {"mode": "token", "secretName": cluster.auth_secret}
    if cluster.redis:
        spec["gcsFaultToleranceOptions"] = _fault_tolerance(cluster)
    spec["enableInTreeAutoscaling"] = cluster.autoscale
    if cluster.autoscale:
        spec["autoscalerOptions"] = _autoscaler(cluster)
    spec["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "enableIngress": False,
        "rayStartParams": {"num-cpus": "0"},
        "template": pods.head(cluster, labels),
    }
    spec["workerGroupSpecs"] = [_group(cluster, group, labels) for group in worker_groups(config)]
    return spec


def _group(cluster: Cluster, group: Group, labels: dict[str, str]) -> Manifest:
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.least,
        "maxReplicas": group.most,
        "labels": {pods.PART: group.name},
        "rayStartParams": {},
        "template": pods.worker(cluster, group, labels),
    }


def _fault_tolerance(cluster: Cluster) -> Manifest:
    options: Manifest = {"redisAddress": cluster.redis}
    if cluster.redis_secret:
        key = {"secretKeyRef": {"name": cluster.redis_secret, "key": "password"}}
        options["redisPassword"] = {"valueFrom": key}
    return options


def _autoscaler(cluster: Cluster) -> Manifest:
    amounts = {"cpu": "500m", "memory": "1G"}
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": cluster.idle_s,
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": pods.container_rights(),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"}],
    }


def _runtime_env(cluster: Cluster) -> Manifest:
    """`ray job stop` kills three seconds after its signal, unless it is told to wait."""
    return {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(cluster.stop_wait_s)}}


def _queue(cluster: Cluster) -> dict[str, str]:
    if cluster.scheduler == "kueue":
        return {"kueue.x-k8s.io/queue-name": cluster.queue}
    if cluster.scheduler == "volcano":
        queue = {"volcano.sh/queue-name": cluster.queue} if cluster.queue else {}
        return {"ray.io/scheduler-name": "volcano", **queue}
    return {}


def _around(config: Config, name: str, labels: dict[str, str]) -> list[Manifest]:
    """Settings, disruption budgets and network policy."""
    text = yaml.safe_dump(settings_for_pods(config), sort_keys=False)
    least = {group.name: group.least for group in worker_groups(config)}
    return [
        _object("v1", "ConfigMap", name, labels, data={pods.CONFIG_FILE: text}),
        _network_policy(config.cluster, name, labels),
        *(_budget(name, labels, part, count) for part, count in {"head": 1, **least}.items() if count),
    ]


def _budget(name: str, labels: dict[str, str], part: str, count: int) -> Manifest:
    """KubeRay's pods have no scale that Kubernetes knows: a budget for them counts pods, and only minAvailable."""
    spec = {
        "minAvailable": count,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": labels | {pods.PART: part}},
    }
    return _object("policy/v1", "PodDisruptionBudget", f"{name}-{part}", labels, spec=spec)


def _network_policy(cluster: Cluster, name: str, labels: dict[str, str]) -> Manifest:
    """Only the run's own pods reach each other; KubeRay's operator reaches the dashboard, Prometheus the metrics."""
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    ingress = [
        {"from": [{"podSelector": {"matchLabels": labels}}]},
        {"from": [operator], "ports": _tcp(_DASHBOARD)},
    ]
    if cluster.monitoring_namespace:
        where = {"matchLabels": {"kubernetes.io/metadata.name": cluster.monitoring_namespace}}
        ingress.append({"from": [{"namespaceSelector": where}], "ports": _tcp(*_METRICS)})
    spec = {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"], "ingress": ingress}
    return _object("networking.k8s.io/v1", "NetworkPolicy", name, labels, spec=spec)


def _tcp(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _object(version: str, kind: str, name: str, labels: dict[str, str], **content: Any) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, **content}
