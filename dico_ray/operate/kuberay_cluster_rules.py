"""What KubeRay's controller asks of a RayCluster's spec beyond its schema. Each rule yields what breaks it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]
Broken = Iterator[str]

_QUALIFIED_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"


def groups_of(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """The head and the worker groups, each with the place it stands at."""
    yield "headGroupSpec", spec["headGroupSpec"]
    for i, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield f"workerGroupSpecs.{i}", group


def autoscales(spec: Spec | None) -> bool:
    return bool(spec and spec.get("enableInTreeAutoscaling"))


def containers_of(group: Spec) -> list[Spec]:
    return group["template"].get("spec", {}).get("containers") or []


def _head_env(spec: Spec) -> dict[str, str]:
    containers = containers_of(spec["headGroupSpec"])
    return {env["name"]: env.get("value", "") for env in (containers[0].get("env") or [])} if containers else {}


def _params(group: Spec) -> dict[str, str]:
    return group.get("rayStartParams") or {}


def groups_have_containers(spec: Spec) -> Broken:
    for where, group in groups_of(spec):
        if not containers_of(group):
            yield f"{where}: needs at least one container"


def resources_are_given_once(spec: Spec) -> Broken:
    for where, group in groups_of(spec):
        if group.get("resources") and any(_params(group).get(name) for name in _RESOURCE_PARAMS):
            yield f"{where}: resources stand both in rayStartParams and in resources; keep one"


def node_labels_are_a_field(spec: Spec) -> Broken:
    for where, group in groups_of(spec):
        if "labels" in _params(group):
            yield f"{where}: rayStartParams.labels is not taken; use the field labels"


def node_labels_have_the_syntax_of_labels(spec: Spec) -> Broken:
    for where, group in groups_of(spec):
        for key, value in (group.get("labels") or {}).items():
            if not _QUALIFIED_NAME.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield f"{where}: labels: {key}={value} is no Kubernetes label"


def replica_range_is_given_and_ordered(spec: Spec) -> Broken:
    """The schema's defaults fill both ends before the controller looks; a range upside down stays."""
    for where, group in groups_of(spec):
        if where == "headGroupSpec":
            continue
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None:
            if not autoscales(spec):
                yield f"{where}: minReplicas and maxReplicas are required without autoscaling"
        elif low > high:
            yield f"{where}: minReplicas {low} is more than maxReplicas {high}"


def fault_tolerance_is_set_by_its_options(spec: Spec) -> Broken:
    env, options = _head_env(spec), spec.get("gcsFaultToleranceOptions")
    if options is None:
        if "RAY_REDIS_ADDRESS" in env:
            yield "headGroupSpec: RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions; set redisAddress there"
        return
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
        if name in env:
            yield f"headGroupSpec: {name} is set beside gcsFaultToleranceOptions; keep it there alone"
    if _params(spec["headGroupSpec"]).get("redis-password"):
        yield "headGroupSpec: rayStartParams.redis-password is set beside gcsFaultToleranceOptions.redisPassword"


def redis_user_is_an_option(spec: Spec) -> Broken:
    if _params(spec["headGroupSpec"]).get("redis-username") or "REDIS_USERNAME" in _head_env(spec):
        yield "headGroupSpec: Redis's user name is set by gcsFaultToleranceOptions.redisUsername alone"


def suspended_groups_do_not_autoscale(spec: Spec) -> Broken:
    for where, group in groups_of(spec):
        if autoscales(spec) and group.get("suspend"):
            yield f"{where}: suspend is not taken with enableInTreeAutoscaling"


def autoscaler_v2_needs_autoscaling(spec: Spec) -> Broken:
    if not autoscales(spec) and _head_env(spec).get(_AUTOSCALER_V2) in ("1", "true"):
        yield f"headGroupSpec: {_AUTOSCALER_V2} is set, and enableInTreeAutoscaling is not"


def autoscaler_version_is_given_once(spec: Spec) -> Broken:
    version = (spec.get("autoscalerOptions") or {}).get("version")
    if autoscales(spec) and version and _AUTOSCALER_V2 in _head_env(spec):
        yield f"autoscalerOptions.version and {_AUTOSCALER_V2} are both set; keep the first"


def autoscaler_v2_restarts_no_pod(spec: Spec) -> Broken:
    version = (spec.get("autoscalerOptions") or {}).get("version")
    if not autoscales(spec) or not (version == "v2" or _head_env(spec).get(_AUTOSCALER_V2) in ("1", "true")):
        return
    for where, group in groups_of(spec):
        policy = group["template"].get("spec", {}).get("restartPolicy")
        if policy not in (None, "", "Never"):
            yield f"{where}: restartPolicy {policy}: autoscaler v2 wants Never, or none"


def tokens_need_ray_2_52(spec: Spec) -> Broken:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        return
    version = re.match(r"v?(\d+)\.(\d+)", str(spec.get("rayVersion") or ""))
    if not version:
        yield "authOptions.mode token needs rayVersion, 2.52.0 or later"
    elif (int(version[1]), int(version[2])) < (2, 52):
        yield f"authOptions.mode token needs rayVersion 2.52.0 or later, not {spec['rayVersion']}"


RULES = (
    groups_have_containers,
    resources_are_given_once,
    node_labels_are_a_field,
    node_labels_have_the_syntax_of_labels,
    replica_range_is_given_and_ordered,
    fault_tolerance_is_set_by_its_options,
    redis_user_is_an_option,
    suspended_groups_do_not_autoscale,
    autoscaler_v2_needs_autoscaling,
    autoscaler_version_is_given_once,
    autoscaler_v2_restarts_no_pod,
    tokens_need_ray_2_52,
)
