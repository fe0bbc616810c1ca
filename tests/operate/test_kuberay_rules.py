"""Every rule of KubeRay's controller has something here that breaks it and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dico_ray.operate import kuberay_cluster_rules, kuberay_job_rules, manifests
from dico_ray.operate.kuberay_check import broken_rules
from dico_ray.settings import merge
from tests.kuberay import config_for, only

Change = dict[str, Any]


def _rule(when: str, policy: str, wait: int = 0) -> Change:
    return {"policy": policy, "condition": {"jobStatus": when, "ttlSeconds": wait}}


def _deletion(*rules: Change) -> Change:
    return {
        "shutdownAfterJobFinishes": False,
        "ttlSecondsAfterFinished": 0,
        "deletionStrategy": {"deletionRules": [*rules]},
    }


def _ends(success: str, failure: str) -> Change:
    return {"deletionStrategy": {"onSuccess": {"policy": success}, "onFailure": {"policy": failure}}}


# rule -> changes to a RayJob's spec that break it, each with what is said
JOB: dict[str, list[tuple[Change, str]]] = {
    "has_one_cluster": [
        ({"rayClusterSpec": None}, "one of rayClusterSpec and clusterSelector"),
        ({"clusterSelector": {"name": "x"}, "backoffLimit": 0}, "set its key ray.io/cluster"),
    ],
    "mode_is_known": [({"submissionMode": "HttpMode"}, "HttpMode is none of")],
    "suspend_needs_shutdown": [
        ({"suspend": True, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}, "suspend needs"),
    ],
    "suspend_needs_a_cluster_of_its_own": [
        ({"suspend": True, "clusterSelector": {"ray.io/cluster": "x"}, "backoffLimit": 0}, "not taken with clusterSel"),
    ],
    "ttl_needs_shutdown": [
        ({"shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
        ({"ttlSecondsAfterFinished": -1}, "-1 is negative"),
    ],
    "retries_make_new_clusters": [
        ({"backoffLimit": -1}, "-1 is negative"),
        ({"clusterSelector": {"ray.io/cluster": "x"}}, "backoffLimit is not taken with clusterSelector"),
        ({"submissionMode": "InteractiveMode"}, "backoffLimit is not taken with InteractiveMode"),
    ],
    "sidecar_stands_alone": [
        ({"submissionMode": "SidecarMode"}, "takes no submitterPodTemplate"),
        ({"submissionMode": "SidecarMode", "submitterPodTemplate": None, "submitterConfig": {"backoffLimit": 1}},
         "takes no submitterConfig"),
        ({"submissionMode": "SidecarMode", "submitterPodTemplate": None, "backoffLimit": 0,
          "clusterSelector": {"ray.io/cluster": "x"}}, "takes no clusterSelector"),
        ({"submissionMode": "SidecarMode", "submitterPodTemplate": None, "rayClusterSpec": {
            "enableInTreeAutoscaling": False,
            "headGroupSpec": {"template": {"spec": {"restartPolicy": "Always"}}}}}, "restartPolicy Never, or none"),
    ],
    "runtime_env_is_yaml": [
        ({"runtimeEnvYAML": "env_vars: {"}, "not YAML"),
        ({"runtimeEnvYAML": "- pip"}, "must hold a mapping"),
    ],
    "deadline_is_positive": [({"activeDeadlineSeconds": 0}, "0 must be positive")],
    "manager_is_known": [({"managedBy": "me"}, "me is none of")],
    "deletion_has_one_form": [
        ({"deletionStrategy": {}}, "needs both onSuccess and onFailure"),
        ({"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}, "needs both onSuccess and onFailure"),
        ({"deletionStrategy": {"onSuccess": {}, "onFailure": {"policy": "DeleteSelf"}}}, "onSuccess: needs a policy"),
        (merge(_deletion(_rule("FAILED", "DeleteSelf")), _ends("DeleteSelf", "DeleteSelf")), "exclude deletionRules"),
    ],
    "deletion_rules_exclude_shutdown": [
        ({"deletionStrategy": {"deletionRules": [_rule("FAILED", "DeleteSelf")]}}, "exclude shutdownAfterJobFinishes"),
        ({"deletionStrategy": {"deletionRules": [_rule("FAILED", "DeleteSelf")]}, "ttlSecondsAfterFinished": 0},
         "exclude shutdownAfterJobFinishes"),
    ],
    "delete_none_excludes_shutdown": [(_ends("DeleteNone", "DeleteSelf"), "DeleteNone excludes")],
    "delete_workers_excludes_autoscaling": [
        (_ends("DeleteWorkers", "DeleteSelf"), "not taken with autoscaling"),
        (_deletion(_rule("FAILED", "DeleteWorkers")), "not taken with autoscaling"),
    ],
    "selected_clusters_are_not_deleted": [
        (_deletion(_rule("FAILED", "DeleteCluster")) | {"clusterSelector": {"ray.io/cluster": "x"}, "backoffLimit": 0},
         "DeleteCluster is not taken"),
    ],
    "deletion_rules_are_unique": [
        (_deletion(_rule("FAILED", "DeleteSelf", 9), _rule("FAILED", "DeleteSelf", 9)), "stands twice"),
    ],
    "deletion_rules_run_in_order": [
        (_deletion(_rule("FAILED", "DeleteCluster", 9), _rule("FAILED", "DeleteSelf", 8)), "before DeleteCluster"),
        (_deletion(_rule("FAILED", "DeleteSelf", -1)), "is negative"),
    ],
}  # fmt: skip


def _head(**changes: Any) -> Change:
    return {"headGroupSpec": changes}


def _env(name: str, value: str) -> Change:
    return _head(template={"spec": {"containers": [{"name": "ray-head", "env": [{"name": name, "value": value}]}]}})


def _worker(**changes: Any) -> Change:
    group = {
        "groupName": "train",
        "minReplicas": 1,
        "maxReplicas": 1,
        "template": {"spec": {"containers": [{"name": "w"}]}},
    }
    return {"workerGroupSpecs": [merge(group, changes)]}


_FIXED = {"enableInTreeAutoscaling": False}
_REDIS = {"gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}
_ALWAYS = {"spec": {"restartPolicy": "Always"}}
_V2_BY_ENV = {"autoscalerOptions": {"version": None}}

# rule -> changes to a RayCluster's spec that break it
CLUSTER: dict[str, list[tuple[Change, str]]] = {
    "groups_have_containers": [
        (_head(template={"spec": {"containers": []}}), "headGroupSpec: needs at least one container"),
        (_worker(template={"spec": {"containers": []}}), "workerGroupSpecs.0: needs at least one container"),
    ],
    "resources_are_given_once": [(_head(resources={"CPU": "1"}), "keep one")],
    "node_labels_are_a_field": [(_worker(rayStartParams={"labels": "a=b"}), "use the field labels")],
    "node_labels_have_the_syntax_of_labels": [
        (_worker(labels={"a b": "c"}), "a b=c is no Kubernetes label"),
        (_worker(labels={"a": "-"}), "a=- is no Kubernetes label"),
        (_worker(labels={"a": "c" * 64}), "is no Kubernetes label"),
    ],
    "replica_range_is_given_and_ordered": [
        (_FIXED | _worker(minReplicas=None), "required without autoscaling"),
        (_FIXED | _worker(maxReplicas=None), "required without autoscaling"),
        (_worker(minReplicas=2), "minReplicas 2 is more than maxReplicas 1"),
    ],
    "fault_tolerance_is_set_by_its_options": [
        (_env("RAY_REDIS_ADDRESS", "redis:6379"), "without gcsFaultToleranceOptions"),
        (_REDIS | _env("RAY_REDIS_ADDRESS", "redis:6379"), "RAY_REDIS_ADDRESS is set beside"),
        (_REDIS | _env("REDIS_PASSWORD", "x"), "REDIS_PASSWORD is set beside"),
        (_REDIS | _head(rayStartParams={"redis-password": "x"}), "redis-password is set beside"),
    ],
    "redis_user_is_an_option": [
        (_head(rayStartParams={"redis-username": "me"}), "redisUsername alone"),
        (_env("REDIS_USERNAME", "me"), "redisUsername alone"),
    ],
    "suspended_groups_do_not_autoscale": [(_worker(suspend=True), "suspend is not taken")],
    "autoscaler_v2_needs_autoscaling": [
        (_FIXED | _env("RAY_enable_autoscaler_v2", "1"), "enableInTreeAutoscaling is not"),
    ],
    "autoscaler_version_is_given_once": [(_env("RAY_enable_autoscaler_v2", "0"), "are both set")],
    "autoscaler_v2_restarts_no_pod": [
        (_head(template=_ALWAYS), "headGroupSpec: restartPolicy Always"),
        (_worker(template={"spec": {"restartPolicy": "OnFailure"}}), "workerGroupSpecs.0: restartPolicy OnFailure"),
        (_V2_BY_ENV | merge(_env("RAY_enable_autoscaler_v2", "1"), _head(template=_ALWAYS)),
         "headGroupSpec: restartPolicy Always"),
    ],
    "tokens_need_ray_2_52": [
        ({"rayVersion": "2.51.2"}, "2.52.0 or later, not 2.51.2"),
        ({"rayVersion": None}, "needs rayVersion"),
        ({"rayVersion": "nightly"}, "needs rayVersion"),
    ],
}  # fmt: skip


def _cases(table: dict[str, list[tuple[Change, str]]]) -> list[Any]:
    return [
        pytest.param(rule, change, says, id=f"{rule}-{i}")
        for rule, changes in table.items()
        for i, (change, says) in enumerate(changes)
    ]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return only(manifests.job(config_for()), "RayJob")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return only(manifests.ray_cluster(config_for()), "RayCluster")


def _broken(spec: dict[str, Any], module: Any) -> dict[str, list[str]]:
    told = {rule.__name__: list(rule(copy.deepcopy(spec))) for rule in module.RULES}
    return {name: lines for name, lines in told.items() if lines}


@pytest.mark.parametrize(("rule", "change", "says"), _cases(JOB))
def test_a_rule_of_jobs(job: dict[str, Any], rule: str, change: Change, says: str) -> None:
    told = _broken(merge(job["spec"], change), kuberay_job_rules)
    assert says in " ".join(told[rule])
    assert set(told) == {rule}


@pytest.mark.parametrize(("rule", "change", "says"), _cases(CLUSTER))
def test_a_rule_of_clusters(cluster: dict[str, Any], rule: str, change: Change, says: str) -> None:
    told = _broken(merge(cluster["spec"], change), kuberay_cluster_rules)
    assert says in " ".join(told[rule])
    assert set(told) == {rule}


def test_every_rule_has_a_case() -> None:
    assert set(JOB) == {rule.__name__ for rule in kuberay_job_rules.RULES}
    assert set(CLUSTER) == {rule.__name__ for rule in kuberay_cluster_rules.RULES}


OBJECT: dict[str, tuple[Change, str]] = {
    "a long name": ({"metadata": {"name": "d" * 48}}, "has 48 characters, and a RayJob takes 47"),
    "a name with dots": ({"metadata": {"name": "dico.h"}}, "DNS-1035"),
    "a name that begins with a digit": ({"metadata": {"name": "7up"}}, "DNS-1035"),
    "an old annotation": (
        {"metadata": {"annotations": {"ray.io/ft-enabled": "true"}}, "spec": {"rayClusterSpec": _REDIS}},
        "ray.io/ft-enabled is set beside",
    ),
    "another old annotation": (
        {"metadata": {"annotations": {"ray.io/external-storage-namespace": "x"}}, "spec": {"rayClusterSpec": _REDIS}},
        "ray.io/external-storage-namespace is set beside",
    ),
    "a rule of jobs": ({"spec": {"activeDeadlineSeconds": 0}}, "spec: activeDeadlineSeconds"),
    "a rule of clusters, in a job": ({"spec": {"rayClusterSpec": {"rayVersion": "2.9.0"}}}, "cluster: authOptions"),
}


@pytest.mark.parametrize("name", OBJECT)
def test_rules_of_whole_objects(job: dict[str, Any], name: str) -> None:
    change, says = OBJECT[name]
    (told,) = broken_rules(merge(job, change))
    assert says in told


def test_a_cluster_may_have_a_longer_name(cluster: dict[str, Any]) -> None:
    assert not list(broken_rules(merge(cluster, {"metadata": {"name": "d" * 53}})))
    (told,) = broken_rules(merge(cluster, {"metadata": {"name": "d" * 54}}))
    assert "takes 53" in told


@pytest.mark.parametrize(
    ("schedule", "good"),
    [
        ("0 3 * * *", True), ("*/15 0-6,22 1 JAN-MAR MON", True), ("@daily", True), ("@every 1h", True),
        ("0 3 * *", False), ("0 3 * * * *", False), ("daily", False), ("", False),
    ],
)  # fmt: skip
def test_cron_jobs_of_kuberay(job: dict[str, Any], schedule: str, good: bool) -> None:
    cron = {"kind": "RayCronJob", "metadata": {"name": "e"}, "spec": {"schedule": schedule, "jobTemplate": job["spec"]}}
    told = list(broken_rules(cron))
    assert ("is no cron schedule" in " ".join(told)) is not good
    (told,) = broken_rules(merge(cron, {"spec": {"schedule": "@daily", "jobTemplate": {"activeDeadlineSeconds": 0}}}))
    assert "activeDeadlineSeconds" in told
    (told,) = broken_rules(cron | {"spec": {"schedule": "@daily"}})
    assert "jobTemplate must be set" in told
