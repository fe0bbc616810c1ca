from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dico_ray import cli
from dico_ray.config import ConfigError
from dico_ray.operate.kuberay_check import problems
from dico_ray.operate.render import render
from dico_ray.settings import merge
from tests.kuberay import config_for, schema_folder


@pytest.fixture(scope="module")
def crds() -> str:
    return schema_folder()


def _write(folder: Path, change: dict[str, Any]) -> str:
    """A rendered job's file, changed."""
    documents = list(yaml.safe_load_all(render(config_for(), "job")))
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump_all([merge(d, change) if d["kind"] == "RayJob" else d for d in documents]))
    return str(file)


def test_what_is_rendered_passes(tmp_path: Path, crds: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write(tmp_path, {})
    assert cli.main(["render", "--check", file, "--crds", crds]) == 0
    assert capsys.readouterr().out == f"render: {file} passes\n"


def test_each_problem_is_a_line_and_the_command_fails(
    tmp_path: Path, crds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write(tmp_path, {"spec": {"entrypointt": "x", "backoffLimit": "ten"}})
    assert cli.main(["render", "--check", file, "--crds", crds]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"{file}: RayJob trial: spec" in line for line in said)


def test_rules_are_asked_with_the_schemas_defaults(tmp_path: Path, crds: str) -> None:
    """Without minReplicas and maxReplicas a group passes, since the API server fills them."""
    group = {"groupName": "w", "template": {"spec": {"containers": [{"name": "w"}]}}}
    cluster = {"enableInTreeAutoscaling": False, "workerGroupSpecs": [group], "rayVersion": "2.51.0"}
    (told,) = problems(_write(tmp_path, {"spec": {"rayClusterSpec": cluster}}), crds)
    assert told == "RayJob trial: cluster: authOptions.mode token needs rayVersion 2.52.0 or later, not 2.51.0"


def test_a_kind_that_kuberay_does_not_have(tmp_path: Path, crds: str) -> None:
    (told,) = problems(_write(tmp_path, {"kind": "RayJobb"}), crds)
    assert told == "kind RayJobb is none of RayCluster, RayJob, RayCronJob"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("kind: Pod\napiVersion: v1", "holds no object of KubeRay"),
        ("apiVersion: ray.io/v1\nkind: RayJob\nwhen: 2026-01-01", "quote the value"),
    ],
)
def test_files_that_cannot_be_checked(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        problems(str(file), "/nowhere")
    assert "\n" not in str(error.value)
