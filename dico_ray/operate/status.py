"""`dico-ray status`: how a run is doing, read from its folder alone, wherever that is; no Ray, no torch."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dico_ray.config import Config, ConfigError
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.telemetry import read_evaluated, read_events, read_metrics

CONFIG, EVALUATION = "config.yaml", "evaluation.json"
_RECENT = 20  # logged points that rate and time left rest on
_SILENT = 10.0  # times its usual pause between logged points, after which a run is taken for one that stands still
_LEAST_SILENCE_S = 120.0
_EVENTS_SHOWN = 5


@dataclass(frozen=True)
class Status:
    """What is known of a run at a time (seconds since the epoch)."""

    name: str
    state: str  # new, starting, running, silent (nothing was heard for long: dead or hanging), stopped, finished
    step: int
    steps: int
    metrics: dict[str, Any]
    rate: float  # images/s, over the last points
    left_s: float | None  # None: not known
    checkpoint: dict[str, Any] | None  # its event
    events: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any] | None  # what `dico-ray evaluate` left
    evaluated: dict[str, Any] | None  # the last numbers of an evaluation beside training
    time: float


def main(config: Config, *, verbose: bool = False, watch: float = 0.0) -> None:
    """Prints once, or with `watch` (seconds between looks) until the run is finished. Raises ConfigError."""
    run = Storage(config.run.folder)
    if not watch:
        Console().print(picture(read(run, time.time())))
        return
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            status = read(run, time.time())
            live.update(picture(status), refresh=True)
            if status.state == "finished":
                return
            time.sleep(watch)


def read(run: Storage, now: float) -> Status:
    """Raises ConfigError if no run was begun there."""
    if not run.exists(CONFIG):
        raise ConfigError(
            f"run.name: {run.url} holds no {CONFIG}, so no run was begun there; see run.storage, run.name"
        )
    config = build(yaml.safe_load(run.read(CONFIG)))
    metrics, events, evaluated = read_metrics(run), read_events(run), read_evaluated(run)
    recent, last = metrics[-_RECENT:], metrics[-1] if metrics else {}
    step, steps = last.get("step", 0), config.train.steps
    step_s = sum(m["step_s"] for m in recent) / len(recent) if recent else None
    checkpoints = [e for e in events if e["event"] == "checkpoint"]
    state = _state(config, step, last, events, now)
    return Status(
        name=config.run.name, state=state, step=step, steps=steps, metrics=last,
        rate=config.train.global_batch / step_s if step_s else 0.0,
        left_s=(steps - step) * step_s if step_s else None,
        checkpoint=checkpoints[-1] if checkpoints else None,
        events=tuple(events[-_EVENTS_SHOWN:]),
        evaluation=json.loads(run.read(EVALUATION)) if run.exists(EVALUATION) else None,
        evaluated=evaluated[-1] if evaluated else None,
        time=now,
    )  # fmt: skip


def _state(config: Config, step: int, last: dict[str, Any], events: list[dict[str, Any]], now: float) -> str:
    """By the last thing that was heard of it, and how long that is ago."""
    if not events:
        return "new"
    if step >= config.train.steps:
        return "finished"
    logged = last.get("time", 0.0)
    if events[-1]["event"] == "end" and logged < events[-1]["time"]:
        return "stopped"
    pause = config.train.log_every * last.get("step_s", 0.0)
    if now - max(logged, events[-1]["time"]) > max(_LEAST_SILENCE_S, _SILENT * pause):
        return "silent"
    return "running" if logged > _started(events) else "starting"


def _started(events: list[dict[str, Any]]) -> float:
    return max((e["time"] for e in events if e["event"] == "start"), default=0.0)


def picture(status: Status) -> Group:
    """What a terminal shows."""
    m = status.metrics
    facts = Table.grid(padding=(0, 2))
    share = status.step / status.steps
    left = f", {_span(status.left_s)} left" if status.left_s and status.state != "finished" else ""
    rows: list[tuple[str, Any]] = [
        ("run", f"{status.name}: {status.state}"),
        ("step", f"{status.step:,} of {status.steps:,} ({share:.1%}){left}"),
        ("", ProgressBar(total=status.steps, completed=status.step, width=40)),
    ]
    if m:
        mfu = f", MFU {m['mfu']:.1%}" if "mfu" in m else ""
        rows += [
            ("rate", f"{status.rate:,.1f} images/s on {m['workers']} workers{mfu}"),
            ("loss", f"{m['loss']:.4f} (gradient norm {m['grad_norm']:.3f}, {m['skipped_steps']} steps skipped)"),
            *([("goodput", _goodput(m))] if "goodput" in m else []),  # a dead driver's last metrics have none
        ]
    rows.append(("checkpoint", _checkpoint(status)))
    if status.evaluated:
        told = ", ".join(
            f"{name} {value:.4g}"
            for name, value in status.evaluated.items()
            if name not in ("step", "time") and not name.startswith("evaluation_") and isinstance(value, int | float)
        )
        rows.append(("beside training", f"step {status.evaluated['step']:,}: {told}"))
    if status.evaluation:
        distance = status.evaluation.get("frechet_distance")
        rows += [("evaluation", f"Frechet distance {distance:.3f}")] if distance is not None else []
    for name, value in rows:
        facts.add_row(f"[bold]{name}[/]" if name else "", value)
    told = Table.grid(padding=(0, 2))
    for event in status.events:
        told.add_row(f"{_span(status.time - event['time'])} ago", event["event"], event["text"])
    return Group(facts, "", told) if status.events else Group(facts)


def _goodput(m: dict[str, Any]) -> str:
    lost = {"starting": m["lost_starting_s"], "done again": m["lost_redone_s"],
            "checkpoints": m["lost_stalled_s"], "waiting for data": m["lost_waiting_s"]}  # fmt: skip
    where = ", ".join(f"{name} {_span(seconds)}" for name, seconds in lost.items())
    return f"{m['goodput']:.1%} of the time of this command; lost: {where}"


def _checkpoint(status: Status) -> str:
    found = status.checkpoint
    if found is None:
        return "none yet"
    text = f"step {found['step']:,}, {_span(status.time - found['time'])} ago, {found['bytes'] / 1e9:.2f} GB"
    return f"{text}, {status.step - found['step']:,} steps since"


def _span(seconds: float) -> str:
    """Seconds in words of two units at most."""
    whole = round(max(0.0, seconds))
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {small}"
    return f"{whole} s"
