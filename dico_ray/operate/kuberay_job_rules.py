"""What KubeRay's controller asks of a RayJob's spec beyond its schema. Each rule yields what breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

from dico_ray.operate.kuberay_cluster_rules import autoscales

Spec = dict[str, Any]
Broken = Iterator[str]

_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")


def has_one_cluster(spec: Spec) -> Broken:
    selector = spec.get("clusterSelector")
    if not spec.get("rayClusterSpec") and not selector:
        yield "one of rayClusterSpec and clusterSelector must be set"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector: names no cluster; set its key ray.io/cluster"


def mode_is_known(spec: Spec) -> Broken:
    mode = spec.get("submissionMode", _MODES[0])
    if mode not in _MODES:
        yield f"submissionMode: {mode} is none of {', '.join(_MODES)}"


def suspend_needs_shutdown(spec: Spec) -> Broken:
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes: true"


def suspend_needs_a_cluster_of_its_own(spec: Spec) -> Broken:
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend is not taken with clusterSelector"


def ttl_needs_shutdown(spec: Spec) -> Broken:
    ttl = spec.get("ttlSecondsAfterFinished") or 0
    if ttl < 0:
        yield f"ttlSecondsAfterFinished: {ttl} is negative"
    if ttl > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"


def retries_make_new_clusters(spec: Spec) -> Broken:
    limit = spec.get("backoffLimit") or 0
    if limit < 0:
        yield f"backoffLimit: {limit} is negative"
    if limit > 0 and spec.get("clusterSelector"):
        yield "backoffLimit is not taken with clusterSelector: each attempt makes a cluster"
    if limit > 0 and spec.get("submissionMode") == "InteractiveMode":
        yield "backoffLimit is not taken with InteractiveMode"


def sidecar_stands_alone(spec: Spec) -> Broken:
    if spec.get("submissionMode") != "SidecarMode":
        return
    for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if spec.get(name):
            yield f"SidecarMode takes no {name}"
    head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
    if head.get("restartPolicy") not in (None, "", "Never"):
        yield f"SidecarMode wants the head's restartPolicy Never, or none, not {head['restartPolicy']}"


def runtime_env_is_yaml(spec: Spec) -> Broken:
    try:
        found = yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except yaml.YAMLError as error:
        yield f"runtimeEnvYAML: not YAML: {' '.join(str(error).split())}"
        return
    if found is not None and not isinstance(found, dict):
        yield "runtimeEnvYAML: must hold a mapping"


def deadline_is_positive(spec: Spec) -> Broken:
    deadline = spec.get("activeDeadlineSeconds")
    if deadline is not None and deadline <= 0:
        yield f"activeDeadlineSeconds: {deadline} must be positive"


def manager_is_known(spec: Spec) -> Broken:
    manager = spec.get("managedBy")
    if manager is not None and manager not in _MANAGERS:
        yield f"managedBy: {manager} is none of {', '.join(_MANAGERS)}"


def deletion_has_one_form(spec: Spec) -> Broken:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    ends = [name for name in ("onSuccess", "onFailure") if strategy.get(name) is not None]
    rules = strategy.get("deletionRules")
    if ends and rules:
        yield "deletionStrategy: onSuccess and onFailure exclude deletionRules"
    elif not rules and len(ends) < 2:
        yield "deletionStrategy: needs both onSuccess and onFailure, or deletionRules"
    for name in ends:
        if not strategy[name].get("policy"):
            yield f"deletionStrategy.{name}: needs a policy"


def deletion_rules_exclude_shutdown(spec: Spec) -> Broken:
    if _rules(spec) and (spec.get("shutdownAfterJobFinishes") or (spec.get("ttlSecondsAfterFinished") or 0) > 0):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"


def delete_none_excludes_shutdown(spec: Spec) -> Broken:
    if spec.get("shutdownAfterJobFinishes") and "DeleteNone" in _ends(spec):
        yield "deletionStrategy: DeleteNone excludes shutdownAfterJobFinishes"


def delete_workers_excludes_autoscaling(spec: Spec) -> Broken:
    if autoscales(spec.get("rayClusterSpec")) and "DeleteWorkers" in _policies(spec):
        yield "deletionStrategy: DeleteWorkers is not taken with autoscaling"


def selected_clusters_are_not_deleted(spec: Spec) -> Broken:
    wrong = {"DeleteCluster", "DeleteWorkers"} & set(_policies(spec))
    if spec.get("clusterSelector") and wrong:
        yield f"deletionStrategy: {', '.join(sorted(wrong))} is not taken with clusterSelector"


def deletion_rules_are_unique(spec: Spec) -> Broken:
    seen = set()
    for i, rule in enumerate(_rules(spec)):
        key = (_when(rule), rule.get("policy"))
        if key in seen:
            yield f"deletionRules.{i}: {rule.get('policy')} for {_when(rule)} stands twice"
        seen.add(key)


def deletion_rules_run_in_order(spec: Spec) -> Broken:
    """Workers go before the cluster, the cluster before the job itself."""
    for when in sorted({_when(rule) for rule in _rules(spec)}):
        waits = {rule.get("policy"): _wait(rule) for rule in _rules(spec) if _when(rule) == when}
        if any(wait < 0 for wait in waits.values()):
            yield f"deletionRules: ttlSeconds for {when} is negative"
        ordered = [policy for policy in _ORDER if policy in waits]
        for first, second in pairwise(ordered):
            if waits[second] < waits[first]:
                yield f"deletionRules: for {when}, {second} ({waits[second]} s) comes before {first} ({waits[first]} s)"


def _rules(spec: Spec) -> list[Spec]:
    return (spec.get("deletionStrategy") or {}).get("deletionRules") or []


def _ends(spec: Spec) -> list[str]:
    strategy = spec.get("deletionStrategy") or {}
    return [(strategy.get(name) or {}).get("policy", "") for name in ("onSuccess", "onFailure")]


def _policies(spec: Spec) -> list[str]:
    return [*_ends(spec), *(rule.get("policy", "") for rule in _rules(spec))]


def _when(rule: Spec) -> str:
    condition = rule.get("condition") or {}
    return str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))


def _wait(rule: Spec) -> int:
    return (rule.get("condition") or {}).get("ttlSeconds") or 0


RULES = (
    has_one_cluster,
    mode_is_known,
    suspend_needs_shutdown,
    suspend_needs_a_cluster_of_its_own,
    ttl_needs_shutdown,
    retries_make_new_clusters,
    sidecar_stands_alone,
    runtime_env_is_yaml,
    deadline_is_positive,
    manager_is_known,
    deletion_has_one_form,
    deletion_rules_exclude_shutdown,
    delete_none_excludes_shutdown,
    delete_workers_excludes_autoscaling,
    selected_clusters_are_not_deleted,
    deletion_rules_are_unique,
    deletion_rules_run_in_order,
)
