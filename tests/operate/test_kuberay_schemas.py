from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from dico_ray.config import ConfigError
from dico_ray.operate import kuberay_schemas, manifests
from dico_ray.operate.kuberay_schemas import load, problems, strict, with_defaults
from tests.kuberay import config_for, only, schema_of


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return schema_of("RayJob")


@pytest.fixture(scope="module")
def rendered() -> dict[str, Any]:
    return only(manifests.job(config_for()), "RayJob")


def _cluster(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]


def _misspelt_group(job: dict[str, Any]) -> None:
    _cluster(job)["headGroupSpecc"] = _cluster(job)["headGroupSpec"]


def _nested_misspelt(job: dict[str, Any]) -> None:
    _cluster(job)["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"


def _word_for_number(job: dict[str, Any]) -> None:
    _cluster(job)["workerGroupSpecs"][0]["replicas"] = "one"


def _no_head(job: dict[str, Any]) -> None:
    del _cluster(job)["headGroupSpec"]


def _no_metadata(job: dict[str, Any]) -> None:
    del job["metadata"]


def _label_that_is_a_number(job: dict[str, Any]) -> None:
    job["metadata"]["labels"]["a"] = 1


def _wrong_quantity(job: dict[str, Any]) -> None:
    containers = _cluster(job)["headGroupSpec"]["template"]["spec"]["containers"]
    containers[0]["resources"]["limits"]["cpu"] = "four"


def _unknown_mode(job: dict[str, Any]) -> None:
    _cluster(job)["authOptions"]["mode"] = "password"


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a misspelt key": (_misspelt_group, "'headGroupSpecc' was unexpected"),
    "a misspelt key deep inside": (_nested_misspelt, "containers.0: .*'imagee' was unexpected"),
    "a word for a number": (_word_for_number, "workerGroupSpecs.0.replicas: 'one' is not of type 'integer'"),
    "a part left out": (_no_head, "'headGroupSpec' is a required property"),
    "no metadata": (_no_metadata, "'metadata' is a required property"),
    "a label that is a number": (_label_that_is_a_number, "metadata.labels.a: 1 is not of type 'string'"),
    "a wrong quantity": (_wrong_quantity, "limits.cpu: 'four' does not match"),
    "a word that is none of the words": (_unknown_mode, "authOptions.mode: 'password' is not one of"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_the_schema_refuses(schema: dict[str, Any], rendered: dict[str, Any], name: str) -> None:
    breaks, says = BREAKS[name]
    job = copy.deepcopy(rendered)
    breaks(job)
    told = problems(job, schema)
    assert len(told) == 1
    assert re.search(says, told[0]), told


def test_defaults_come_first(schema: dict[str, Any], rendered: dict[str, Any]) -> None:
    """min and max replicas are required, and the schema fills them: without them the API server takes the object."""
    job = copy.deepcopy(rendered)
    group = _cluster(job)["workerGroupSpecs"][0]
    for name in ("replicas", "minReplicas", "maxReplicas"):
        del group[name]
    assert problems(job, schema) == []
    filled = _cluster(with_defaults(job, schema))["workerGroupSpecs"][0]
    assert (filled["replicas"], filled["minReplicas"], filled["maxReplicas"]) == (0, 0, 2**31 - 1)
    assert "replicas" not in group, "the document itself stays"


def test_null_takes_the_default_where_it_cannot_be_null() -> None:
    schema = {"properties": {"a": {"default": 1}, "b": {"default": 1, "nullable": True}, "c": {"type": "string"}}}
    assert with_defaults({"a": None, "b": None, "c": None}, schema) == {"a": 1, "b": None, "c": None}


SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        "note": {"type": "string", "nullable": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@pytest.mark.parametrize(
    ("spec", "passes"),
    [
        ({"port": 80}, True), ({"port": "http"}, True), ({"port": 1.5}, False), ({"note": None}, True),
        ({"port": None}, False), ({"free": {"any": [1]}}, True), ({"labels": {"any": "x"}}, True),
        ({"labels": {"any": 1}}, False), ({"other": 1}, False),
    ],
)  # fmt: skip
def test_kubernetes_own_dialect(spec: dict[str, Any], passes: bool) -> None:
    from jsonschema import Draft202012Validator

    assert Draft202012Validator(strict(SMALL, root=False)).is_valid(spec) is passes


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serves a folder by HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


_FILE = "spec: {versions: [{schema: {openAPIV3Schema: {type: object}}}]}"


def test_schemas_from_a_url(tmp_path: Path, web: str) -> None:
    (tmp_path / "ray.io_rayjobs.yaml").write_text(_FILE)
    assert load("RayJob", web) == {"type": "object"}
    with pytest.raises(ConfigError, match=r"--crds http://.*ray.io_rayclusters.yaml: HTTP Error 404"):
        load("RayCluster", web)


def test_a_release_is_a_url_of_kuberay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, web: str) -> None:
    (tmp_path / "v1.6.0" / "crds").mkdir(parents=True)
    (tmp_path / "v1.6.0" / "crds" / "ray.io_rayjobs.yaml").write_text(_FILE)
    assert kuberay_schemas.RELEASE.startswith("https://raw.githubusercontent.com/ray-project/kuberay/{}/")
    monkeypatch.setattr(kuberay_schemas, "RELEASE", f"{web}/{{}}/crds")
    assert load("RayJob", "v1.6.0") == {"type": "object"}


def test_schemas_from_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script stands in for a kubectl that reaches a cluster: it answers as that does, if it is asked so."""
    (tmp_path / "crd.json").write_text(json.dumps(yaml.safe_load(_FILE)))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\n[ "$*" = "get crd rayjobs.ray.io -o json" ] || {{ echo "NotFound: $*" >&2; exit 1; }}\n'
        f"exec cat {tmp_path}/crd.json\n"
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert load("RayJob", "") == {"type": "object"}
    with pytest.raises(ConfigError, match=r"NotFound: get crd rayclusters.ray.io -o json; reach a cluster"):
        load("RayCluster", "")


def test_schemas_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; name a folder"):
        load("RayJob", str(tmp_path))
    (tmp_path / "ray.io_rayjobs.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="is no CustomResourceDefinition"):
        load("RayJob", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"kubectl get crd rayjobs.ray.io.*give --crds a folder"):
        load("RayJob", "")
