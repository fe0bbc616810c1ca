from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dico_ray import cli
from dico_ray.config import Config, ConfigError
from dico_ray.operate import kuberay_check, manifests
from dico_ray.operate.render import KINDS, render
from tests.kuberay import config_for, only, schema_of

FULL: dict[str, Any] = {
    "spot": True, "data_nodes": [1, 8], "redis": "redis:6379", "redis_secret": "redis", "credentials_secret": "store",
    "service_account": "trainer", "monitoring_namespace": "monitoring", "scheduler": "volcano", "queue": "research",
    "storage_claim": "disk", "node_labels": {"gpu": "h100"}, "node_resources": {"rdma/ib": 8},
}  # fmt: skip
VARIANTS: dict[str, Config] = {
    "plain": config_for(),
    "full": config_for(cluster=FULL, train={"num_workers": [8, 32]}),
    "fixed": config_for(cluster={"autoscale": False, "scheduler": "kueue", "queue": "team"}),
    "on CPUs": config_for("tiny-cpu", cluster={"gpus_per_node": 0}),
    "without tokens": config_for(cluster={"auth": "disabled", "ray_version": "2.51.0"}),
}


def documents(config: Config, kind: str = "job", verb: str = "train") -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(config, kind, verb)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_is_valid(variant: str, kind: str) -> None:
    for document in documents(VARIANTS[variant], kind):
        if document["apiVersion"] == "ray.io/v1":
            assert kuberay_check.problems_of(document, schema_of(document["kind"])) == []
        else:
            kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("cluster", [{"redis": "redis://:hush@redis:6379"},
                                     {"env": {"HTTPS_PROXY": "http://me:hush@proxy:3128"}}])  # fmt: skip
def test_a_login_in_a_url_is_in_no_manifest(cluster: dict[str, Any]) -> None:
    says = r"cluster\.(redis|env\.HTTPS_PROXY): the URL holds a login, and manifests hold none; use a secret$"
    with pytest.raises(ConfigError, match=says) as error:
        documents(config_for(cluster=cluster))
    assert "hush" not in str(error.value)


def test_a_job_trains_and_is_tried_again() -> None:
    spec = only(documents(config_for(cluster={"retries": 7, "stop_wait_s": 400})), "RayJob")["spec"]
    assert spec["entrypoint"] == "exec dico-ray train --config /etc/dico-ray/run.yaml"
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (7, True)
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "400"}}


def test_a_job_of_another_verb_stands_beside_the_training() -> None:
    found = documents(config_for(), verb="encode")
    assert only(found, "RayJob")["spec"]["entrypoint"].startswith("exec dico-ray encode ")
    names = {document["metadata"]["name"] for document in found}
    assert names.isdisjoint({document["metadata"]["name"] for document in documents(config_for())})


def test_the_pods_settings_are_the_runs() -> None:
    for kind in ("job", "cluster"):
        found = documents(config_for(train={"lr": 3e-4}), kind)
        text = only(found, "ConfigMap")["data"]["run.yaml"]
        assert yaml.safe_load(text)["train"] == {"lr": 3e-4}
        assert "cluster" not in yaml.safe_load(text)


def _pods(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = document["spec"].get("rayClusterSpec") or document["spec"]
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return groups | {"head": spec["headGroupSpec"]["template"]}


def test_the_nodes_of_a_run() -> None:
    job = only(documents(VARIANTS["full"]), "RayJob")["spec"]["rayClusterSpec"]
    train, data = job["workerGroupSpecs"]
    assert (train["minReplicas"], train["maxReplicas"]) == (1, 4)
    assert (data["minReplicas"], data["maxReplicas"]) == (1, 8)
    assert job["enableInTreeAutoscaling"] is True
    assert job["autoscalerOptions"]["version"] == "v2"
    assert "autoscalerOptions" not in only(documents(VARIANTS["fixed"]), "RayJob")["spec"]["rayClusterSpec"]
    assert job["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_budgets_policies_and_services_find_their_pods() -> None:
    found = documents(VARIANTS["full"])
    job = only(found, "RayJob")
    labels = {part: template["metadata"]["labels"] for part, template in _pods(job).items()}
    labels["submitter"] = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    for budget in [d for d in found if d["kind"] == "PodDisruptionBudget"]:
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        part = budget["metadata"]["name"].removeprefix("trial-")
        assert [name for name, have in labels.items() if wanted <= have.items()] == [part]
        assert isinstance(budget["spec"]["minAvailable"], int), "all that Kubernetes takes for KubeRay's pods"
    policy = only(found, "NetworkPolicy")["spec"]
    assert all(policy["podSelector"]["matchLabels"].items() <= have.items() for have in labels.values())
    # KubeRay's services select by these; a value of ours would hide the head from its own service.
    assert not [key for have in labels.values() for key in have if key.startswith(("app.kubernetes.io", "ray.io"))]


def test_dashboards_are_not_exposed() -> None:
    for kind in ("job", "cluster"):
        found = documents(VARIANTS["full"], kind)
        ray = found[-1]["spec"].get("rayClusterSpec") or found[-1]["spec"]
        assert (ray["headGroupSpec"]["serviceType"], ray["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
        own, operator, prometheus = only(found, "NetworkPolicy")["spec"]["ingress"]
        assert own == {"from": [{"podSelector": {"matchLabels": {"dico-ray/run": "trial"}}}]}
        assert [port["port"] for port in operator["ports"]] == [8265]
        assert 8265 not in [port["port"] for port in prometheus["ports"]]
        assert not {"Ingress", "Service"} & {document["kind"] for document in found}
    assert len(only(documents(config_for()), "NetworkPolicy")["spec"]["ingress"]) == 2


def test_tokens_by_reference_and_on_by_default() -> None:
    ray = only(documents(config_for()), "RayJob")["spec"]["rayClusterSpec"]
    assert ray["authOptions"] == {"mode": "token", "secretName": "dico-ray-auth"}
    assert "kubectl create secret generic dico-ray-auth" in render(config_for(), "job")
    off = render(VARIANTS["without tokens"], "job")
    assert "authOptions" not in off
    assert "create secret" not in off


def test_gang_scheduling() -> None:
    for kind, name in (("job", "RayJob"), ("cluster", "RayCluster")):
        volcano = only(documents(VARIANTS["full"], kind), name)["metadata"]["labels"]
        assert volcano.items() >= {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "research"}.items()
        kueue = only(documents(VARIANTS["fixed"], kind), name)["metadata"]["labels"]
        assert kueue["kueue.x-k8s.io/queue-name"] == "team"
    assert "queue" not in str(only(documents(config_for()), "RayJob")["metadata"])


def test_fault_tolerance_of_the_head() -> None:
    ray = only(documents(VARIANTS["full"], "cluster"), "RayCluster")["spec"]
    secret = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert ray["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379", "redisPassword": secret}
    assert "gcsFaultToleranceOptions" not in only(documents(config_for(), "cluster"), "RayCluster")["spec"]


def test_the_evaluation_is_submitted_to_the_cluster_of_the_same_config() -> None:
    config = config_for(run={"name": "DiCo_B"}, cluster={"evaluate_schedule": "30 */6 * * *"})
    spec = only(documents(config, "cron"), "CronJob")["spec"]
    cluster = only(documents(config, "cluster"), "RayCluster")
    assert (spec["schedule"], spec["concurrencyPolicy"]) == ("30 */6 * * *", "Forbid")
    template = spec["jobTemplate"]["spec"]["template"]
    command = template["spec"]["containers"][0]["command"]
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in command
    assert template["metadata"]["labels"].items() >= cluster["metadata"]["labels"].items()
    with pytest.raises(ConfigError, match="evaluate.reference: unset"):
        render(config_for(evaluate={"reference": ""}), "cron")


def test_no_manifest_holds_a_credential() -> None:
    """Whatever looks like a credential is a reference to a secret."""
    for config in VARIANTS.values():
        for kind in KINDS:
            text = "\n".join(line for line in render(config, kind).splitlines() if not line.startswith("#"))
            assert not re.search(r"AKIA|://[^/@\s]+:[^/@\s]+@", text)
            for document in yaml.safe_load_all(text):
                assert document["kind"] != "Secret"
                for name, value in _variables(document):
                    assert not (value and re.search("TOKEN|SECRET|PASSWORD|KEY", name)), name


def _variables(node: Any) -> list[tuple[str, str]]:
    """Every environment variable with a value of its own, anywhere in a document."""
    if isinstance(node, list):
        return [found for item in node for found in _variables(item)]
    if not isinstance(node, dict):
        return []
    own = [(item["name"], item.get("value", "")) for item in node.get("env") or []]
    return own + [found for item in node.values() for found in _variables(item)]


WRONG: dict[str, tuple[list[str], str]] = {
    "no image": (["--cluster.image", ""], "cluster.image: unset"),
    "an image without a tag": (["--cluster.image", "registry:5000/dico-ray"], "can change under a run"),
    "the latest image": (["--cluster.image", "dico-ray:latest"], "can change under a run"),
    "tokens with an old Ray": (["--cluster.ray_version", "2.51.0"], "has no token authentication"),
    "a kind": (["--kind", "service"], "--kind service is unknown"),
    "a verb": (["--verb", "plan"], "--verb plan: --kind job takes one of encode"),
    "a verb of a cluster": (["--kind", "cluster", "--verb", "encode"], "the others none"),
    "a local folder": (["--run.storage", "runs"], "run.storage: "),
    "a long name": (["--run.name", "d" * 48], "KubeRay takes 47"),
    "a long name of a verb": (["--run.name", "d" * 44, "--verb", "encode"], "KubeRay takes 40"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_exit_with_2_and_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, says = WRONG[name]
    file = tmp_path / "run.yaml"
    file.write_text(config_for().to_yaml())
    with pytest.raises(SystemExit) as stop:
        cli.main(["render", "--config", str(file), *words])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert says in told
    assert len(told.splitlines()) == 1


def test_to_a_file_or_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "job.yaml"
    file.write_text(config_for().to_yaml())
    assert cli.main(["render", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["render", "--config", str(file), "--output", str(out)]) == 0
    assert out.read_text() == shown == render(config_for(), "job")


def test_manifests_are_plain_data() -> None:
    for build_kind in KINDS.values():
        found = build_kind(config_for())
        assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert set(manifests.VERBS) <= set(cli.VERBS)
