"""cluster/slurm.sh: what it starts, and how it ends. Slurm does not install for a test: small scripts stand in."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> "$LOG/scontrol"; fi',
    # Runs what stands after its own options, as Slurm would on the node.
    "srun": 'while [ "${1#-}" != "$1" ]; do echo "$1" >> "$LOG/srun"; shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": 'echo "$@ $RAY_AUTH_MODE" >> "$LOG/ray"; [ "$1" = start ] && exec sleep 300; exit 0',
    # Commits for a second after SIGTERM, and ends as dico-ray does then.
    "dico-ray": 'until [ "$(grep -c ^start "$LOG/ray")" = 2 ]; do sleep 0.05; done; '
    'echo "$@ $RAY_ADDRESS" > "$LOG/verb"; stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$LOG/mode"; '
    'trap \'sleep 1; touch "$LOG/committed"; exit 143\' TERM; touch "$LOG/up"; '
    '[ "$1" = fail ] && exit 7; [ "$1" = done ] && exit 0; while true; do sleep 0.1; done',
}  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in COMMANDS.items():
        file = commands / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(tmp_path), "HOME": str(tmp_path), "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip


@pytest.mark.parametrize(("verb", "code"), [("done", 0), ("fail", 7)])
def test_ray_on_every_node_and_the_verbs_exit_code(
    tmp_path: Path, environment: dict[str, str], verb: str, code: int
) -> None:
    done = subprocess.run([SCRIPT, verb, "--config", "run.yaml"], env=environment, check=False, timeout=180)
    assert done.returncode == code
    assert (tmp_path / "verb").read_text() == f"{verb} --config run.yaml 10.0.0.1:20077\n"
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not list((tmp_path / ".ray").iterdir()), "the token stays on the disk"
    options = (tmp_path / "srun").read_text().split()
    assert {"--nodelist=node1", "--nodelist=node2"} <= set(options)
    assert options.count("--cpus-per-task=4") == options.count("--exact") == 2, "each step of Ray gets its CPUs"
    head = next(line for line in (tmp_path / "ray").read_text().splitlines() if "--head" in line)
    assert "--num-gpus=8" in head
    assert head.endswith(" token")
    assert not (tmp_path / "scontrol").exists()


def test_before_the_time_is_over_training_commits_and_the_job_is_queued_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    job = subprocess.Popen([SCRIPT, "train"], env=environment)
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=180) == 143
        assert (tmp_path / "committed").exists()
        assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
        assert not list((tmp_path / ".ray").iterdir())
    finally:
        job.kill()
        job.wait()
