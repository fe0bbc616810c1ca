"""The check of manifests: KubeRay's schemas, strictly, and the rules that only its controller knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dico_ray.config import ConfigError
from dico_ray.operate import kuberay_cluster_rules, kuberay_job_rules, kuberay_schemas

_LONGEST_NAME = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 52}
_SCHEDULE_FIELD = r"(\*|[\dA-Za-z]+(-[\dA-Za-z]+)?)(/\d+)?"
_SCHEDULE = re.compile(rf"(@\w+( \S+)?)|({_SCHEDULE_FIELD}(,{_SCHEDULE_FIELD})*( |$)){{5}}")


def problems(file: str, crds: str) -> list[str]:
    """What is wrong with the KubeRay objects in a YAML file, a line each; other kinds are left to kubectl.

    crds: where KubeRay's schemas are (kuberay_schemas.load). Raises ConfigError if file or schemas cannot be read, or
    no document is KubeRay's.
    """
    schema = cache(lambda kind: kuberay_schemas.load(kind, crds))
    found: list[str] = []
    ours = [document for document in _documents(file) if str(document.get("apiVersion", "")).startswith("ray.io/")]
    if not ours:
        raise ConfigError(f"--check {file}: holds no object of KubeRay (apiVersion: ray.io/v1)")
    for document in ours:
        kind, name = document.get("kind"), (document.get("metadata") or {}).get("name")
        if kind not in kuberay_schemas.PLURALS:
            found.append(f"kind {kind} is none of {', '.join(kuberay_schemas.PLURALS)}")
            continue
        found += [f"{kind} {name}: {line}" for line in problems_of(document, schema(kind))]
    return found


def _documents(file: str) -> list[dict[str, Any]]:
    try:
        documents = list(yaml.safe_load_all(Path(file).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--check {file}: {error.strerror}; name a file of manifests") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--check {file}: not YAML: {' '.join(str(error).split())}") from None
    return [kuberay_schemas.as_json(document) for document in documents if isinstance(document, dict)]


def problems_of(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What is wrong with one object: by its schema, and, if it passes that, by the controller's rules."""
    found = kuberay_schemas.problems(document, schema)
    return found or list(broken_rules(kuberay_schemas.with_defaults(document, schema)))


def broken_rules(document: dict[str, Any]) -> Iterator[str]:
    """What KubeRay's controller would refuse of an object as it sees it, that is with the schema's defaults."""
    kind, spec = document["kind"], document["spec"]
    yield from name_is_short_and_plain(document)
    yield from fault_tolerance_has_one_home(document)
    if kind == "RayCronJob":
        yield from schedule_has_five_fields(spec)
        spec = spec.get("jobTemplate")
        if not spec:
            return
    if kind in ("RayJob", "RayCronJob"):
        for rule in kuberay_job_rules.RULES:
            yield from (f"spec: {line}" for line in rule(spec))
        spec = spec.get("rayClusterSpec")
    for rule in kuberay_cluster_rules.RULES if spec else ():
        yield from (f"cluster: {line}" for line in rule(spec))


def name_is_short_and_plain(document: dict[str, Any]) -> Iterator[str]:
    """KubeRay makes further names of it, and Kubernetes cuts names at 63 characters."""
    kind, name = document["kind"], document["metadata"].get("name", "")
    if len(name) > _LONGEST_NAME[kind]:
        yield f"metadata.name: {name} has {len(name)} characters, and a {kind} takes {_LONGEST_NAME[kind]}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name: {name!r}: lower-case letters, digits and '-', beginning with a letter (DNS-1035)"


def fault_tolerance_has_one_home(document: dict[str, Any]) -> Iterator[str]:
    """The old annotations and gcsFaultToleranceOptions exclude each other."""
    notes, spec = document["metadata"].get("annotations") or {}, document["spec"]
    options = (spec.get("rayClusterSpec") or spec).get("gcsFaultToleranceOptions")
    for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if options is not None and notes.get(name):
            yield f"metadata.annotations: {name} is set beside gcsFaultToleranceOptions; keep the options"


def schedule_has_five_fields(spec: dict[str, Any]) -> Iterator[str]:
    if not _SCHEDULE.fullmatch(spec.get("schedule", "")):
        yield f"spec.schedule: {spec.get('schedule')!r} is no cron schedule (minute hour day month weekday)"
    if not spec.get("jobTemplate"):
        yield "spec.jobTemplate must be set"
