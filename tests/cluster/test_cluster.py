"""The folder cluster/: its manifests are what `dico-ray render` writes, its other files pass their own checkers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from dico_ray.config import Config
from dico_ray.operate.kuberay_check import problems_of
from dico_ray.operate.render import render
from dico_ray.recipes import resolve
from tests.kuberay import schema_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/run.yaml"))
READY = sorted(str(path.relative_to(FOLDER)) for case in CASES for path in (FOLDER / case).glob("*.yaml")
               if path.stem in ("job", "cluster", "cron"))  # fmt: skip


def config_of(case: str) -> Config:
    return resolve(None, str(FOLDER / case / "run.yaml"), {})


def test_the_three_cases_are_there() -> None:
    assert CASES == ["gpu64", "gpu8", "kind"]
    gpus = {case: config_of(case).train.worker_range[1] for case in CASES if config_of(case).cluster.gpus_per_node}
    assert gpus == {"gpu64": 64, "gpu8": 8}
    assert config_of("gpu64").model.name == "DiCo-H"
    assert {f"{case}/job.yaml" for case in CASES} <= set(READY)


@pytest.mark.parametrize("file", READY)
def test_ready_made_manifests_are_rendered(file: str) -> None:
    """To mend: dico-ray render --kind KIND --config cluster/CASE/run.yaml --output cluster/CASE/KIND.yaml."""
    path = FOLDER / file
    assert path.read_bytes() == render(config_of(path.parent.name), path.stem).encode()


@pytest.mark.parametrize("file", [file for file in READY if not file.endswith("cron.yaml")])
def test_ready_made_manifests_pass_the_check(file: str) -> None:
    ours = [d for d in yaml.safe_load_all((FOLDER / file).read_text()) if d["apiVersion"] == "ray.io/v1"]
    assert len(ours) == 1
    assert problems_of(ours[0], schema_of(ours[0]["kind"])) == []


def test_the_volume_of_the_small_case() -> None:
    import kubernetes_validate

    claim = yaml.safe_load((FOLDER / "kind" / "volume.yaml").read_text())
    kubernetes_validate.validate(claim, "1.31", strict=True)
    assert claim["metadata"]["name"] == config_of("kind").cluster.storage_claim


def _tool(name: str, *words: str) -> None:
    """Runs a checker that pip installed beside this Python."""
    command = [str(Path(sys.executable).with_name(name)), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linters_find_nothing() -> None:
    _tool("hadolint", str(FOLDER / "Dockerfile"))
    _tool("shellcheck", str(FOLDER / "slurm.sh"))


def test_the_image_is_locked_and_not_root() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert "--require-hashes" in text
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()}
    assert "*" in ignored
    assert copied == {line[1:] for line in ignored if line.startswith("!")}, "the build gets what it copies, no more"


def test_the_lock_has_every_dependency_with_a_hash() -> None:
    text = (FOLDER / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    pins = {}
    for entry in entries:
        pin = re.match(r"([a-z0-9.-]+)==(\S+)", entry)
        assert pin, entry[:80]
        assert "--hash=sha256:" in entry, pin[1]
        pins[pin[1]] = pin[2]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(w for extra in ("s3", "gs", "track", "vms") for w in project["optional-dependencies"][extra]),
    ]
    names = {re.match(r"[A-Za-z0-9-]+", word)[0].lower() for word in wanted}  # type: ignore[index]
    assert names <= set(pins)
    assert not {"pytest", "ruff", "pyright"} & set(pins), "the image carries no tools of development"
    assert pins["ray"] == Config.model_validate({}).cluster.ray_version


def test_the_cluster_launcher_takes_the_file() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((FOLDER / "ray-vms.yaml").read_text())
    jsonschema.validate(config, schema)
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert config["provider"]["use_internal_ips"] is True
    image = (FOLDER / "Dockerfile").read_text()
    assert all(word in image for word in ("openssh-client", "rsync")), "the launcher and the head copy files by them"
    assert not any(word in json.dumps(config) for word in ("privileged", "aws_secret", "IPC_LOCK"))


def test_slurm_hands_the_token_over_by_a_file() -> None:
    text = (FOLDER / "slurm.sh").read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN=" not in text, "other users can read a process's arguments and environment"


def test_no_file_holds_a_credential() -> None:
    files = [path for folder in (FOLDER, ROOT / "jobs") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    wrong = partial(
        re.search, r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/@\s]+:[^/@\s]+@|(?i:password|secret)\s*[=:]\s*['\"]?\w{12,}"
    )
    assert [path.name for path in files if path.suffix != ".lock" and wrong(path.read_text(errors="replace"))] == []


def test_a_jobs_runtime_environment_gives_time_to_commit() -> None:
    from ray.runtime_env import RuntimeEnv

    found = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    RuntimeEnv(**found)
    seconds = int(found["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert seconds == Config.model_validate({}).cluster.stop_wait_s
