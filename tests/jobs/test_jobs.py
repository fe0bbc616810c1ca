"""The scripts in jobs/ through `ray job submit`, against a `ray start --head` and a worker node of their own."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dico_ray.job import STOP_WAIT
from dico_ray.settings import read_yaml
from tests.clusters import ROOT, Cluster, until
from tests.s3 import BUCKET, KEY, SECRET, server
from tests.watching import Prometheus

pytestmark = pytest.mark.ray
RUNTIME_ENV = ("--runtime-env", str(ROOT / "jobs" / "runtime_env.yaml"))


def test_every_verb_runs_as_a_job(done: dict[str, subprocess.CompletedProcess[str]], settings: Path) -> None:
    for job in done.values():
        assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-1000:]
        assert "succeeded" in job.stdout + job.stderr
    run = settings / "runs" / "job"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 201)
    )
    assert len(list((run / "samples" / "images").rglob("*.png"))) == 20
    assert json.loads((run / "evaluation.json").read_text())["frechet_distance"] > 0


def test_a_job_with_a_wrong_setting_fails_with_its_line(cluster: Cluster, settings: Path) -> None:
    job = cluster.submit("train.py", "--config", str(settings / "run.yaml"), "--train.zero_stagee", "2")
    assert job.returncode != 0
    assert "--train.zero_stagee is not a setting; did you mean train.zero_stage?" in job.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def last_step(run: Path) -> int:
    found = lines(run / "metrics.jsonl")
    return found[-1]["step"] if found else 0


def test_a_stopped_job_commits_and_the_same_submission_continues_at_that_step(
    cluster: Cluster, settings: Path, done: Any
) -> None:
    """Two workers, one on each node. After the stop no process of the job is left."""
    run = settings / "runs" / "stopped"
    command = (
        "train.py", "--config", str(settings / "run.yaml"), "--run.name", "stopped", "--train.num_workers", "2",
        "--train.steps", "100000", "--train.checkpoint_every", "100000", "--data.window_samples", "8192",
    )  # fmt: skip
    stopped = 0
    for number in range(2):  # the second time it is the continuation that is stopped
        job = f"stopping-{number}"
        sent = cluster.submit(*command, options=(*RUNTIME_ENV, "--no-wait", "--submission-id", job))
        assert sent.returncode == 0, sent.stdout + sent.stderr
        until(lambda beyond=stopped + 2: last_step(run) > beyond, "steps")
        starts = [event["step"] for event in lines(run / "events.jsonl") if event["event"] == "start"]
        assert starts[-1] == stopped
        assert len(cluster.workers("RayTrainWorker")) == 2
        cluster.ray("job", "stop", job)
        assert "was stopped" in (status := cluster.ray("job", "status", job).stdout), status
        text = cluster.ray("job", "logs", job).stdout
        assert "train: SIGTERM: saving a checkpoint" in text
        assert "Traceback" not in text
        stopped = last_step(run)
        assert f"stopped by SIGTERM after step {stopped}; the same command continues there" in text
        until(lambda: not cluster.workers("RayTrainWorker"), "end of the workers")
    assert len([event for event in lines(run / "events.jsonl") if event["event"] == "checkpoint"]) == 2


def test_outputs_inside_the_job_s_copy_are_refused_and_a_short_stop_is_told(cluster: Cluster, settings: Path) -> None:
    job = cluster.submit("train.py", "--config", str(settings / "run.yaml"), "--run.storage", "here")
    assert job.returncode != 0
    assert "train: `ray job stop` leaves 3 s before it kills" not in job.stdout
    assert "dico-ray: run.storage: /" in job.stdout
    assert "is in the job's own copy of the working directory, which is deleted with the job" in job.stdout
    done = cluster.submit("train.py", "--config", str(settings / "run.yaml"), "--data.latents", str(settings / "no"))
    assert "train: `ray job stop` leaves 3 s before it kills" in done.stdout


@pytest.mark.slow
def test_no_key_is_in_anything_that_a_run_leaves_behind(
    cluster: Cluster, settings: Path, done: Any, tmp_path: Path
) -> None:
    """A job trains from and into a real S3 server with keys in its config file; then all is searched for the key."""
    with server(tmp_path) as s3:
        client = s3.client()
        for path in (settings / "latents").iterdir():
            client.put_object(Bucket=BUCKET, Key=f"latents/{path.name}", Body=path.read_bytes())
        own = {
            "run": {"storage": f"s3://{BUCKET}/runs", "name": "secret"}, "data": {"latents": f"s3://{BUCKET}/latents"},
            "storage": {"endpoint": s3.endpoint, "options": {"key": KEY, "secret": SECRET}},
            "train": {"num_workers": 2},
        }  # fmt: skip
        config = read_yaml(str(settings / "run.yaml"))
        merged = {name: {**section, **own.get(name, {})} for name, section in {**own, **config}.items()
                  if isinstance(section, dict)}  # fmt: skip
        (tmp_path / "run.yaml").write_text(json.dumps({"recipe": "tiny-cpu", **merged}))
        job = cluster.submit(
            "train.py", "--config", str(tmp_path / "run.yaml"), "--verbose",
            options=(*RUNTIME_ENV, "--submission-id", "secret"),
        )  # fmt: skip
        assert job.returncode == 0, job.stdout[-3000:]
        found = {"the job's log": (job.stdout + job.stderr).encode()}
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix="runs/secret/")["Contents"]
        for entry in listed:
            found[entry["Key"]] = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
    for page in ("jobs/", "jobs/secret", "v0/actors?detail=true", "v0/tasks?detail=true", "v0/runtime_envs",
                 "v0/workers?detail=true", "v0/nodes?detail=true"):  # fmt: skip
        url = f"{cluster.dashboard}/api/{page}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found[url] = answer.read()
    found |= {str(path): path.read_bytes() for path in cluster.files()}
    names = " ".join(found)
    for part in ("config.yaml", "commit.json", ".safetensors", "metrics.jsonl", "events.jsonl", "tensorboard",
                 "gcs_server", "raylet", "worker-", "job-driver-secret"):  # fmt: skip
        assert part in names, f"nothing of {part} was searched"
    assert [name for name, data in found.items() if SECRET.encode() in data] == []


def test_every_query_of_the_dashboard_names_what_prometheus_scraped(
    done: dict[str, Any], watch: Prometheus, settings: Path
) -> None:
    """Of the jobs above. Ray's agents told it, and the head's list of nodes led to them."""
    board = json.loads((ROOT / "cluster" / "grafana" / "dico-ray.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    queries += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    named = {name for query in queries for name in re.findall(r"ray_dico_ray_\w+", query)}
    scraped = watch.names()
    assert named - scraped == set()
    for query in queries:
        if not query.startswith("label_values"):
            watch.query(query.replace("$run", ".*"))  # what Prometheus cannot parse it refuses
    rules = (ROOT / "cluster" / "prometheus" / "alerts.yaml").read_text()
    assert set(re.findall(r"ray_dico_ray_\w+[a-z]\b", rules.replace("ray_dico_ray_lost_*_s", ""))) - scraped == set()
    verbs = {found["metric"]["verb"] for found in watch.query('max_over_time(ray_dico_ray_work_total{run="job"}[1h])')}
    assert verbs == {"encode", "train", "sample", "evaluate"}
    logged = lines(settings / "runs" / "job" / "metrics.jsonl")
    (last,) = watch.query('last_over_time(ray_dico_ray_step{run="job"}[1h])')
    assert float(last["value"][1]) <= logged[-1]["step"]


def test_the_runtime_environment_asks_for_time_and_holds_no_key() -> None:
    env = read_yaml(str(ROOT / "jobs" / "runtime_env.yaml"))
    assert env["env_vars"] == {STOP_WAIT: "600"}


def test_the_scripts_are_thin() -> None:
    for script in (ROOT / "jobs").glob("*.py"):
        assert len(script.read_text().splitlines()) <= 25
