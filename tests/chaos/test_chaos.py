"""What a run survives: faults hit real processes, and the curve is the undisturbed one, with no committed step lost.

`make test-chaos` prints a table: fault, steps that were done again, seconds until training was as far as before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from tests.chaos.runs import EVERY, STEPS, Run, kill_one
from tests.s3 import BUCKET, KEY, SECRET, FaultProxy, server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]
TOLERANCE = 1e-4  # of each loss, relative: other world sizes add up in another order


@pytest.fixture(scope="module")
def undisturbed(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = Run(tmp_path_factory.mktemp("calm") / "run", str(latents)).start()
    assert run.end() == 0, run.tail()
    return run.losses()


@pytest.fixture
def run(latents: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run", str(latents))
    yield run
    run.kill()


def recovered(run: Run, fault: str, at: int, began: float) -> None:
    """Waits until the run is as far as it was, and prints the table's row."""
    starts = len(run.starts())
    start = run.until(lambda: len(run.starts()) > starts and run.starts()[-1], "restart") if starts == 1 else None
    start = start or run.starts()[-1]
    run.until(lambda: run.step > at, f"step {at + 1}")
    lost = max(0, at - start["step"])
    assert start["step"] >= at // EVERY * EVERY - EVERY  # one checkpoint may have been under way
    print(f"\n| {fault} | {lost} | {time.monotonic() - began:.1f} |")


def finishes(run: Run, undisturbed: list[float]) -> None:
    assert run.end() == 0, run.tail()
    np.testing.assert_allclose(run.losses(), undisturbed, rtol=TOLERANCE)


def test_a_worker_killed_in_a_step(run: Run, undisturbed: list[float]) -> None:
    at, began = run.start().until_step(25), time.monotonic()
    kill_one(run)
    recovered(run, "SIGKILL of a worker in a step", at, began)
    finishes(run, undisturbed)


def torn(run: Run, with_all_parts: bool) -> bool:
    """Whether a checkpoint is being written at this moment."""
    folder = run.folder / "checkpoints"
    for step in sorted(folder.glob("step-*")) if folder.exists() else ():
        names = {path.name for path in step.iterdir()}
        told = {f"rank-{rank:05d}.json" for rank in range(2)} & names
        if "commit.json" not in names and (len(told) == 2 if with_all_parts else names):
            return True
    return False


@pytest.mark.parametrize("all_parts", [False, True])
def test_a_worker_killed_while_it_saves(run: Run, undisturbed: list[float], all_parts: bool) -> None:
    """Before all parts are written, and between the last part and the marker. The torn folder goes, and is told."""
    run.start().until_step(2 * EVERY)
    caught = False
    while not caught:  # the marker may come between the look and the stop: then at the next checkpoint
        run.until(lambda: torn(run, all_parts), "checkpoint under way")
        for worker in run.workers():
            worker.suspend()
        caught, at, began = torn(run, False), run.step, time.monotonic()
        for worker in run.workers() if not caught else ():
            worker.resume()
    for worker in run.workers():
        worker.kill()
    recovered(run, f"SIGKILL {'before the marker' if all_parts else 'while parts are written'}", at, began)
    finishes(run, undisturbed)
    told = [e for e in run.lines("events.jsonl") if e["event"] == "torn checkpoint removed"]
    assert len(told) == 1
    assert not torn(run, False)


def test_the_driver_killed(run: Run, undisturbed: list[float]) -> None:
    """The same command continues; the killed one's workers may be alive for a moment."""
    at = run.start().until_step(35)
    assert run.process
    run.process.kill()
    began = time.monotonic()
    run.process.wait()
    run.start()
    recovered(run, "SIGKILL of the command, started again at once", at, began)
    finishes(run, undisturbed)


def test_sigterm_commits_and_the_same_command_continues(run: Run, undisturbed: list[float]) -> None:
    run.start().until_step(33)
    assert run.process
    run.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.end() == 128 + signal.SIGTERM, run.tail()
    print(f"\n| SIGTERM to the command: committed and ended | 0 | {time.monotonic() - began:.1f} |")
    assert "stopped by SIGTERM after step" in run.tail()
    stopped = run.step
    run.start().until_step(stopped + 1)
    assert run.starts()[-1]["step"] == stopped
    finishes(run, undisturbed)


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head with room for reading alone, and two nodes for a worker each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def elastic(run: Run, nodes: Cluster, more: dict[str, Any] | None = None) -> Run:
    run.env = {"RAY_ADDRESS": nodes.address}
    own = {"resources.worker_cpus": 2, "train.num_workers": "[1,2]", "train.micro_batch": 8}
    run.settings = {**own, **(more or {})}
    return run.start()


def test_a_node_lost(run: Run, nodes: Cluster, undisturbed: list[float]) -> None:
    """Training goes on with one worker, which accumulates what two did at once."""
    at, began = elastic(run, nodes).until_step(25), time.monotonic()
    assert run.starts()[-1]["workers"] == 2
    nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
    recovered(run, "a node lost (elastic, 2 -> 1 workers)", at, began)
    assert run.starts()[-1]["workers"] == 1
    finishes(run, undisturbed)


def test_a_node_drained(run: Run, nodes: Cluster, undisturbed: list[float]) -> None:
    """A preemption notice: a checkpoint is committed before the node goes, and nothing is done twice."""
    at = elastic(run, nodes).until_step(15)
    node = nodes.list_all_nodes()[-1]
    began = time.monotonic()
    drain = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", nodes.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "30",
    ]  # fmt: skip
    subprocess.run(drain, check=True, capture_output=True)
    run.until(lambda: len(run.starts()) > 1, "restart")
    start = run.starts()[-1]
    assert start["workers"] == 1
    assert start["step"] >= at
    done = max(e["step"] for e in run.lines("events.jsonl") if e["event"] == "checkpoint")
    assert start["step"] == done
    run.until(lambda: run.step > start["step"], "next step")
    print(f"\n| a node drained (elastic, 2 -> 1 workers) | 0 | {time.monotonic() - began:.1f} |")
    finishes(run, undisturbed)


def test_a_node_added(run: Run, undisturbed: list[float]) -> None:
    """Training on one worker notices the room for a second one, commits, and goes on with two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        elastic(run, cluster, {"train.steps": 4000, "train.checkpoint_every": 1000, "train.grow_every_s": 2})
        run.until_step(5)
        assert run.starts()[-1]["workers"] == 1
        cluster.add_node(num_cpus=2)
        began = time.monotonic()
        run.until(lambda: len(run.starts()) > 1, "restart")
        start = run.starts()[-1]
        assert start["workers"] == 2
        run.until_step(max(STEPS, start["step"] + 5))
        print(f"\n| a node added (elastic, 1 -> 2 workers) | 0 | {time.monotonic() - began:.1f} |")
        assert run.process
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM
    finally:
        run.kill()
        cluster.shutdown()
    metrics = run.lines("metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    np.testing.assert_allclose([m["loss"] for m in metrics[:STEPS]], undisturbed, rtol=TOLERANCE)


def test_the_store_away_for_half_a_minute(run: Run, undisturbed: list[float], latents: Path, tmp_path: Path) -> None:
    """Reads and checkpoints wait, and nothing fails. Metrics are written there too."""
    with server(tmp_path / "s3") as store, FaultProxy(store.port) as proxy:
        client = store.client()
        for path in latents.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"latents/{path.name}", Body=path.read_bytes())
        mirror = f"s3://{BUCKET}/runs"
        run.latents = f"s3://{BUCKET}/latents"
        run.settings = {"run.storage": mirror, "run.name": "run", "storage.endpoint": proxy.endpoint}
        run.env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
        run.start()
        run.until(lambda: b"checkpoint: step 20" in run.log.read_bytes(), "checkpoint of step 20")
        began = time.monotonic()
        proxy.away(30)
        assert run.end(240) == 0, run.tail()
        print(f"\n| the object store away for 30 s | 0 | {time.monotonic() - began:.1f} to the end of the run |")
        text = client.get_object(Bucket=BUCKET, Key="runs/run/metrics.jsonl")["Body"].read().decode()
        events = client.get_object(Bucket=BUCKET, Key="runs/run/events.jsonl")["Body"].read().decode()
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "metrics.jsonl").write_text(text)
    np.testing.assert_allclose(run.losses(), undisturbed, rtol=TOLERANCE)
    assert '"event": "failure"' not in events


def test_a_full_disk(latents: Path, tmp_path: Path, undisturbed: list[float]) -> None:
    """Checkpoints fail, are told, and training goes on; once there is room, the next one is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mount.stderr.strip()}")
    run = Run(disk / "run", str(latents), {"train.max_failed_saves": 50})
    try:
        run.start().until_step(15)
        filler = disk / "filler"
        with open(filler, "wb") as file:
            free = os.statvfs(disk)
            file.write(b"x" * (free.f_bavail * free.f_frsize - 40_000))  # for metrics
        run.until(lambda: b"checkpoint failed" in run.log.read_bytes(), "failed checkpoint")
        filler.unlink()
        finishes(run, undisturbed)
    finally:
        run.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)
    print("\n| the disk full, then free again | 0 | - |")


def test_a_byte_changed_in_a_checkpoint(run: Run) -> None:
    """The command says which file, and that an earlier one is to be taken; it trains nothing."""
    run.settings = {"train.steps": 20, "train.num_workers": 1}
    assert run.start().end() == 0, run.tail()
    (part,) = (run.folder / "checkpoints").glob("step-00000020-*/rank-00000-part-000.safetensors")
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    run.settings["train.steps"] = 30
    began = time.monotonic()
    assert run.start().end() == 1
    assert f"{part} at byte" in run.tail()
    assert "the bytes differ from what was committed; take an earlier checkpoint" in run.tail()
    assert run.step == 20
    print(f"\n| a byte changed in the last checkpoint: refused, by name | - | {time.monotonic() - began:.1f} |")


def test_two_runs_of_one_name(run: Run, undisturbed: list[float]) -> None:
    """The newer takes over; the older says so and ends."""
    run.settings = {"train.steps": 4000, "train.checkpoint_every": 50}
    run.start().until_step(25)
    newer = Run(run.folder, run.latents, run.settings).start()
    try:
        assert run.end() == 1, run.tail()
        assert "another run of the same run.name and run.storage has taken over" in run.tail()
        newer.until_step(max(STEPS, newer.step + 5))
        assert newer.process
        newer.process.send_signal(signal.SIGTERM)
        assert newer.end() == 128 + signal.SIGTERM, newer.tail()
    finally:
        newer.kill()
    print("\n| two runs of one name: the older ends, told why | - | - |")
    metrics = run.lines("metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    np.testing.assert_allclose([m["loss"] for m in metrics[:STEPS]], undisturbed, rtol=TOLERANCE)
