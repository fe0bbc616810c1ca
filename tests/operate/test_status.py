"""`dico-ray status` from what runs leave in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dico_ray.cli import main
from dico_ray.config import ConfigError
from dico_ray.operate import status
from dico_ray.settings import build
from dico_ray.storage import Storage

NOW = 1_000_000.0


def metrics(step: int, ago: float, **own: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 0.5 - step / 1000, "grad_norm": 0.25, "skipped_steps": 1, "step_s": 2.0, "workers": 8,
        "mfu": 0.31, "goodput": 0.9, "lost_starting_s": 60.0, "lost_redone_s": 0.0, "lost_stalled_s": 3.0,
        "lost_waiting_s": 4.0, "time": NOW - ago, **own,
    }  # fmt: skip


def event(kind: str, ago: float, **own: Any) -> dict[str, Any]:
    return {"time": NOW - ago, "event": kind, "text": f"about the {kind}", **own}


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """A run of 1,000 steps of 256 images, logged every ten."""
    config = build({"run": {"storage": str(tmp_path), "name": "one"}, "train": {"steps": 1000, "log_every": 10}})
    storage = Storage(config.run.folder)
    storage.write("config.yaml", config.to_yaml().encode())
    return storage


def write(run: Storage, metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    for name, found in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        run.write(name, "".join(json.dumps(line) + "\n" for line in found).encode())


def text(found: status.Status) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(status.picture(found))
    return captured.get()


def test_a_running_run(run: Storage) -> None:
    events = [event("start", 700), event("checkpoint", 90, step=200, seconds=8.0, bytes=16_600_000_000)]
    write(run, [metrics(step, 620 - 2 * step) for step in range(10, 310, 10)], events)
    found = status.read(run, NOW)
    assert (found.state, found.step, found.rate, found.left_s) == ("running", 300, 128.0, 1400.0)
    shown = text(found)
    for part in ("one: running", "300 of 1,000 (30.0%), 23 min 20 s left", "128.0 images/s on 8 workers, MFU 31.0%",
                 "0.2000", "90.0% of the time", "starting 1 min 0 s",
                 "step 200, 1 min 30 s ago, 16.60 GB, 100 steps since", "about the checkpoint"):  # fmt: skip
        assert part in shown


@pytest.mark.parametrize(
    ("logged", "events", "state"),
    [
        ([], [], "new"),
        ([], [event("start", 20)], "starting"),
        ([metrics(300, 50)], [event("start", 90), event("failure", 30), event("start", 10)], "starting"),
        ([metrics(300, 900)], [event("start", 2000)], "silent"),
        ([metrics(300, 190)], [event("start", 2000)], "running"),  # ten of its pauses of 20 s are not over yet
        ([], [event("start", 200)], "silent"),
        ([metrics(300, 900)], [event("start", 2000), event("end", 890)], "stopped"),
        ([metrics(1000, 9000)], [event("start", 9900), event("end", 8900)], "finished"),
    ],
)
def test_the_state_by_what_was_heard_last(run: Storage, logged: Any, events: Any, state: str) -> None:
    write(run, logged, events)
    found = status.read(run, NOW)
    assert found.state == state
    assert f"one: {state}" in text(found)


def test_a_torn_line_and_metrics_without_goodput_are_no_obstacle(run: Storage) -> None:
    kept = metrics(10, 5)
    for name in ("goodput", "time"):
        del kept[name]
    write(run, [kept], [event("start", 9)])
    with open(run.path("metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write('{"step": 20, "los')
    found = status.read(run, NOW)
    assert found.step == 10
    assert "goodput" not in text(found)


def test_the_evaluation_is_shown(run: Storage) -> None:
    write(run, [metrics(1000, 5)], [event("start", 9)])
    run.write("evaluation.json", json.dumps({"frechet_distance": 2.0512}).encode())
    assert "Frechet distance 2.051" in text(status.read(run, NOW))


def test_evaluations_beside_training_are_no_steps_of_it(run: Storage) -> None:
    beside = {"step": 200, "frechet_distance": 31.5, "evaluation_images": 2000, "evaluation_s": 9.0, "time": NOW - 1}
    write(run, [metrics(300, 5), beside], [event("start", 900)])
    found = status.read(run, NOW)
    assert (found.step, found.state, found.rate) == (300, "running", 128.0)
    assert "step 200: frechet_distance 31.5" in text(found)


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: .*nobody holds no config\.yaml"):
        status.read(Storage(str(tmp_path / "nobody")), NOW)


def test_the_live_view_ends_with_the_run(run: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, [metrics(1000, 5)], [event("start", 9)])
    folder = Path(run.path("x")).parents[1]
    assert main(["status", "--run.storage", str(folder), "--run.name", "one", "--watch", "0.1"]) == 0
    assert "one: finished" in capsys.readouterr().out
