"""KubeRay's own schemas, and strict validation against them: what the API server would say, and what it would drop."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from dico_ray.config import ConfigError

Schema = dict[str, Any]

PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
RELEASE = "https://raw.githubusercontent.com/ray-project/kuberay/{}/helm-chart/kuberay-operator/crds"
_TIMEOUT_S = 30
# libyaml's loader, where PyYAML was built with it, reads a megabyte of schema in a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER_OR_STRING = "x-kubernetes-int-or-string"


def load(kind: str, source: str) -> Schema:
    """The openAPIV3 schema of a KubeRay kind ("RayJob"), at its stored version.

    source: a folder or URL of KubeRay's CRD files, a release ("v1.6.0"), or "" for the cluster that kubectl reaches.
    Raises ConfigError if there is none.
    """
    name = f"ray.io_{PLURALS[kind]}.yaml"
    if not source:
        text = _from_cluster(f"{PLURALS[kind]}.ray.io")
    elif re.fullmatch(r"v\d+\.\d+\.\d+\S*", source):
        text = _from_url(f"{RELEASE.format(source)}/{name}")
    elif source.startswith(("http://", "https://")):
        text = _from_url(f"{source.rstrip('/')}/{name}")
    else:
        text = _from_folder(Path(source) / name)
    try:
        return yaml.load(text, _LOADER)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        raise ConfigError(f"--crds {source}: {name} is no CustomResourceDefinition with a schema") from None


def _from_cluster(resource: str) -> str:
    command = ["kubectl", "get", "crd", resource, "-o", "json"]
    hint = "reach a cluster with KubeRay, or give --crds a folder, a URL or a release such as v1.6.0"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"`{' '.join(command)}`: {error}; {hint}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"`{' '.join(command)}`: {last}; {hint}")
    return done.stdout


def _from_url(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError, UnicodeDecodeError) as error:
        raise ConfigError(f"--crds {url}: {error}; name a release, or a URL with KubeRay's CRD files") from None


def _from_folder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--crds {file}: {error.strerror}; name a folder with KubeRay's CRD files") from None


def with_defaults(value: Any, schema: Schema) -> Any:
    """`value` as the API server stores it: with the schema's defaults where keys are missing, or null."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        filled = {
            key: deepcopy(part["default"]) for key, part in properties.items() if _takes_default(value, key, part)
        }
        rest = schema.get("additionalProperties")
        other = rest if isinstance(rest, dict) else {}
        given = {key: item for key, item in value.items() if key not in filled}
        return filled | {key: with_defaults(item, properties.get(key, other)) for key, item in given.items()}
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def _takes_default(value: dict[str, Any], key: str, part: Schema) -> bool:
    return "default" in part and (key not in value or (value[key] is None and not part.get("nullable")))


def problems(document: dict[str, Any], schema: Schema) -> list[str]:
    """What is wrong with a document by its schema, a line each: unknown keys too, which the API server only drops."""
    from jsonschema import Draft202012Validator

    found = Draft202012Validator(strict(schema)).iter_errors(with_defaults(document, schema))
    return [_line(error) for error in sorted(found, key=lambda e: [str(part) for part in e.absolute_path])]


def _line(error: Any) -> str:
    where = ".".join(str(part) for part in error.absolute_path) or "the document"
    message = error.message if len(error.message) < 300 else f"{error.message[:300]}..."
    return f"{where}: {message}"


def strict(schema: Schema, root: bool = True) -> Schema:
    """An openAPIV3 schema of Kubernetes -> JSON Schema that refuses unknown keys.

    Its dialect says integer-or-string, nullable and "keep unknown fields" by keys of its own, and leaves the inside
    of metadata to the API server.
    """
    out: Schema = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get(_INTEGER_OR_STRING):
        out.pop("type", None)
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in out:
        kind = out["type"]
        out["type"] = [*(kind if isinstance(kind, list) else [kind]), "null"]
    if "properties" in schema:
        out["properties"] = {name: strict(part, False) for name, part in schema["properties"].items()}
        if root:
            out["properties"]["metadata"] = _METADATA
            out["required"] = sorted({*schema.get("required", []), "metadata", "spec"})
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"], False)
    if "items" in schema:
        out["items"] = strict(schema["items"], False)
    return out


_NAMES = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "generateName": {"type": "string"}, "namespace": {"type": "string"},
        "labels": _NAMES, "annotations": _NAMES, "finalizers": {"type": "array"}, "ownerReferences": {"type": "array"},
    },
    "additionalProperties": False,
}  # fmt: skip

_KEPT = (
    "type", "enum", "required", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems",
    "uniqueItems", "anyOf", "additionalProperties",
)  # fmt: skip


def as_json(document: Any) -> Any:
    """A YAML document as the API server gets it: YAML's dates and other kinds have no place there."""
    try:
        return json.loads(json.dumps(document))
    except TypeError as error:
        raise ConfigError(f"not plain data: {error}; quote the value") from None
