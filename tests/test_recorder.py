"""The recorder's numbers where people look for them."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from dico_ray import recorder
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.telemetry import EVALUATED, read_evaluated, read_events, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def metrics(step: int, **own: float) -> dict[str, Any]:
    return {"step": step, "loss": 0.25, "step_s": 0.01, "checkpoint_stall_s": 0.0, "data_wait": 0.1, **own}


def scrape() -> str:
    """What Prometheus gets from this node's agent."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def test_metrics_reach_prometheus_and_the_run_s_files(tmp_path: Path) -> None:
    config = build({"run": {"storage": str(tmp_path), "name": "watched"}})
    keeper = recorder.start(config)
    ray.get(keeper.begin.remote(0, "000001-00000000", 2, [], {"engine": 1.5}))
    ray.get(keeper.log.remote(metrics(10, loss=0.125)))
    ray.get(keeper.evaluated.remote({"step": 5, "fid": 9.5, EVALUATED: 100}))
    end = time.monotonic() + 180
    while "dico_ray_evaluation_step" not in (text := scrape()) and time.monotonic() < end:
        time.sleep(1)
    (line,) = [line for line in text.splitlines() if "dico_ray_loss{" in line]
    assert 'run="watched"' in line
    assert float(line.split()[-1]) == 0.125
    shown = {name: float(value) for name, value in re.findall(r"dico_ray_(\w+)\{.*\} (\S+)", text)}
    assert (shown["step"], shown["evaluation_step"], shown["fid"]) == (10, 5, 9.5)
    ray.get(keeper.close.remote())
    run = Storage(config.run.folder)
    (logged,) = read_metrics(run)
    assert logged["loss"] == 0.125
    assert 0 < logged["goodput"] <= 1
    (judged,) = read_evaluated(run)
    assert {**judged, "time": 0} == {"step": 5, "fid": 9.5, EVALUATED: 100, "time": 0}
    assert [e["event"] for e in read_events(run)] == ["start"]


def test_until_the_first_log_the_alert_waits_as_long_as_the_watchdog(tmp_path: Path) -> None:
    """DicoRayStalled fires after ten times log_due_s and some more."""
    config = build({"run": {"storage": str(tmp_path), "name": "slow"}, "train": {"hang_timeout_s": 7200}})
    keeper = recorder.Recorder(config)
    keeper.begin(0, "000001-00000000", 2, [], {})
    assert keeper._gauges._numbers["log_due_s"] == 720
    keeper.close()


def test_what_was_done_twice_is_no_goodput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    goodput = recorder.Goodput()
    goodput.begin(0)
    now[0] = 30.0  # ten seconds to start, then ten steps of two seconds, a tenth of it waiting
    found = goodput.add(metrics(10, step_s=2.0, checkpoint_stall_s=1.0))
    assert found["goodput"] == pytest.approx(17 / 30)
    assert found["lost_starting_s"] == pytest.approx(10)
    goodput.begin(5)  # steps 6 to 10 are lost; the logged stretch ends beyond
    now[0] = 40.0
    found = goodput.add(metrics(10, step_s=1.0, data_wait=0.0, validation_s=2.0))
    assert found["lost_redone_s"] == pytest.approx(17)
    assert found["lost_validating_s"] == 2.0
    assert found["lost_starting_s"] == pytest.approx(40 - 17 - 5 - 2 - 1 - 2)  # redone, useful, waited, stalled, this
    assert found["goodput"] == pytest.approx(5 / 40)
