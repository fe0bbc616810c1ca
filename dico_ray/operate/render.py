"""`dico-ray render`: Kubernetes manifests of a run, and the check of manifests. Needs neither torch nor Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from dico_ray.config import Cluster, Config, ConfigError, UserError
from dico_ray.operate import manifests
from dico_ray.operate.pod_settings import LOGIN_IN_URL

KINDS = {"job": manifests.job, "cluster": manifests.ray_cluster, "cron": manifests.cron}
_FIRST_RAY_WITH_TOKENS = (2, 52)


def main(
    config: Config,
    *,
    kind: str = "job",
    verb: str = manifests.TRAIN,
    output: str = "",
    check: str = "",
    crds: str = "",
    verbose: bool = False,
) -> None:
    """`dico-ray render`: writes manifests to `output` or the terminal, or checks those of the file `check`.

    Raises ConfigError for settings that give no working manifests, UserError if the checked file breaks a rule.
    """
    if check:
        _check(check, crds)
        return
    text = render(config, kind, verb)
    if output:
        Path(output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def render(config: Config, kind: str, verb: str = manifests.TRAIN) -> str:
    """YAML documents: a RayJob of one verb ("job"), a RayCluster ("cluster"), or an evaluation's CronJob ("cron").

    A function of the arguments alone. Raises ConfigError.
    """
    if kind not in KINDS:
        raise ConfigError(f"--kind {kind} is unknown; take one of {', '.join(KINDS)}")
    if verb not in manifests.VERBS or (verb != manifests.TRAIN and kind != "job"):
        raise ConfigError(f"--verb {verb}: --kind job takes one of {', '.join(manifests.VERBS)}, the others none")
    _check_settings(config.cluster)
    documents = manifests.job(config, verb) if kind == "job" else KINDS[kind](config)
    head = "".join(f"# {line}\n" for line in _needs(config, kind, verb))
    return head + "---\n" + "---\n".join(_dump(document) for document in documents)


def _check_settings(cluster: Cluster) -> None:
    if not cluster.image:
        raise ConfigError("cluster.image: unset; build one with cluster/Dockerfile, push it, and name it with its tag")
    if ":" not in cluster.image.rpartition("/")[2] or cluster.image.endswith(":latest"):
        raise ConfigError(
            f"cluster.image: {cluster.image} can change under a run; name a tag other than latest, or a digest"
        )
    version = tuple(int(part) for part in cluster.ray_version.split("."))
    if cluster.auth == "token" and version < _FIRST_RAY_WITH_TOKENS:
        raise ConfigError(
            f"cluster.ray_version: {cluster.ray_version} has no token authentication; take 2.52.0 or newer"
        )
    for name, text in {"redis": cluster.redis, **{f"env.{name}": text for name, text in cluster.env.items()}}.items():
        if LOGIN_IN_URL.search(text):
            raise ConfigError(f"cluster.{name}: the URL holds a login, and manifests hold none; use a secret")


def _needs(config: Config, kind: str, verb: str) -> list[str]:
    """What has to be there before the manifests are applied."""
    cluster = config.cluster
    of = f" --verb {verb}" if kind == "job" and verb != manifests.TRAIN else ""
    token = f"kubectl create secret generic {cluster.auth_secret} --from-literal=auth_token=$(openssl rand -hex 32)"
    return [
        f"Made by `dico-ray render --kind {kind}{of}`: change the run's config and render again. It needs:",
        *([f"- Ray's token, once per namespace: {token}"] if cluster.auth == "token" else []),
        *_named("secret {}: a key for each variable of the object store (AWS_...)", cluster.credentials_secret),
        *_named("secret {}: Redis's password at the key password", cluster.redis_secret),
        *_named("secret {}: the image registry's login", cluster.pull_secret),
        *_named("service account {}, bound to an identity that may use the object store", cluster.service_account),
        *_named("PersistentVolumeClaim {}", cluster.storage_claim),
        *_named("Kueue's or Volcano's queue {}", cluster.queue),
    ]


def _named(text: str, name: str) -> list[str]:
    return [f"- {text.format(name)}"] if name else []


class _Dumper(yaml.SafeDumper):
    """Plain YAML: texts of several lines as blocks, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=4096)


def _check(file: str, crds: str) -> None:
    from dico_ray.operate import kuberay_check

    problems = kuberay_check.problems(file, crds)
    if problems:
        raise UserError("\n".join(f"{file}: {problem}" for problem in problems))
    print(f"render: {file} passes")
