"""What a verb that runs as a submitted job checks, by the environment that Ray gives such a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dico_ray import job
from dico_ray.config import ConfigError
from dico_ray.settings import build


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job with a copy of its own."""
    env = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip", "env_vars": {job.STOP_WAIT: "600"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(env))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plain_command_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert job.check("train", build({}), ["--storage.options", "{}"]) == ""


@pytest.mark.parametrize(
    ("verb", "settings", "named"),
    [
        ("train", {}, "run.storage"),
        ("encode", {}, "data.latents"),
        ("sample", {"run": {"storage": "s3://b/r"}, "sample": {"output": "out"}}, "sample.output"),
        ("evaluate", {"run": {"storage": "runs"}}, "run.storage"),
    ],
)
def test_outputs_in_the_copy_are_refused(submitted: Path, verb: str, settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}: .* is deleted with the job; set {named} to an object store"):
        job.check(verb, build(settings), [])


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "/shared/runs"])
def test_outputs_elsewhere_are_fine(submitted: Path, storage: str) -> None:
    assert job.check("train", build({"run": {"storage": storage}}), []) == ""


def test_a_verb_that_writes_nothing_may_name_what_is_in_the_copy(submitted: Path) -> None:
    assert job.check("plan", build({}), []) == ""


def test_keys_on_the_command_line_are_refused_without_being_shown(submitted: Path) -> None:
    with pytest.raises(ConfigError, match="a job's command line stands in Ray's dashboard") as caught:
        job.check("train", build({}), ["--storage.options={secret: hush}"])
    assert "hush" not in str(caught.value)


def test_a_short_stop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, warned in (({}, True), ({job.STOP_WAIT: "10"}, True), ({job.STOP_WAIT: "60"}, False)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": given}}))
        monkeypatch.delenv(job.STOP_WAIT, raising=False)
        assert bool(job.check("train", build({}), [])) == warned
        assert job.check("sample", build({}), []) == ""
