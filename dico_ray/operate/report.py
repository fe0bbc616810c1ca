"""`dico-ray report`: a run -> one HTML file without outside resources.

It shows the loss beside the published one, samples and scores as training went on, speed and where time went, events,
and what all this rests on. What a run does not have is left out.
"""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment
from PIL import Image

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config, ConfigError
from dico_ray.evaluate import result_file
from dico_ray.operate.plots import loss_plot, published, scores_plot, telemetry_plot
from dico_ray.sample import GRID, RECORD, output_folder
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.train import CONFIG
from dico_ray.training import evaluations
from dico_ray.training.telemetry import EVALUATED, read_evaluated, read_events, read_metrics

REPORT = "report.html"
_GRIDS, _GRID_PIXELS = 8, 1000  # shown of those that training left, and their width at the most
_EVENTS = 200  # the newest
_PHASES = ("draw", "forward", "backward", "optimizer", "ema")
_LOSSES = {"starting": "starting, and what no cause is known for", "redone": "steps done again",
           "stalled": "standing still for checkpoints", "waiting": "waiting for data",
           "validating": "validation"}  # fmt: skip
_NAMES = {"fid": "FID", "frechet_distance": "Frechet distance"}


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray report`: writes report.html into the run's folder. Samples and evaluations appear where they exist.

    Raises ConfigError if there is no such run.
    """
    run = Storage(config.run.folder)
    metrics = read_metrics(run)
    if not metrics and not run.exists(CONFIG):
        raise ConfigError(f"run.name: {config.run.folder} has no metrics; train it, or name another run")
    run.write(REPORT, render(config, run, metrics).encode())
    print(f"report: {run.path(REPORT)}")


def render(config: Config, run: Storage, metrics: list[dict[str, Any]]) -> str:
    """The page, from what lies in the run's folder."""
    trained = build(yaml.safe_load(run.read(CONFIG)))
    samples = output_folder(config)
    made = _json(samples, RECORD)
    evaluation = _json(*result_file(config))
    judged = evaluation.get("judge") if evaluation else None
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    facts = {
        "name": config.run.name, "folder": run.url, "config": trained, "model": trained.model.name,
        "parameters": parameter_count(trained.model), "last": metrics[-1] if metrics else None,
        "grid": base64.b64encode(samples.read(GRID)).decode() if made else None,
        "grid_text": _grid_text(made) if made else "",
        "evaluation": evaluation, "distance": _headline(evaluation) if evaluation else None, "judge": judged,
        "by_class": list(((judged or {}).get("by_class") or {}).items()),
        "grids": _grids(run.at(evaluations.FOLDER)), "events": _events(run),
        "facts": _facts(made, evaluation), "settings": trained.to_yaml(),
        **(_training(trained, metrics) if metrics else {}), **_scores(read_evaluated(run)),
    }  # fmt: skip
    return Environment(autoescape=True).from_string(page).render(facts)


def _training(trained: Config, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says of training's numbers: at least one line of them."""
    held_out = [m for m in metrics if "val_loss" in m]
    mfu = [m["mfu"] for m in metrics if "mfu" in m]
    return {
        "rate": median(m["images_per_s"] for m in metrics), "mfu": median(mfu) if mfu else None,
        "held_out": held_out[-1] if held_out else None,
        "loss_plot": loss_plot(metrics, trained.model), "published": bool(published(trained.model)),
        "telemetry_plot": telemetry_plot(metrics), "phases": _phases(metrics), "lost": _lost(metrics[-1]),
    }  # fmt: skip


def _json(storage: Storage, name: str) -> dict[str, Any] | None:
    return json.loads(storage.read(name)) if storage.exists(name) else None


def _headline(evaluation: dict[str, Any]) -> tuple[float, str]:
    """The distance and its name, which tells on how many images it rests where the result says so."""
    value = evaluation.get("fid")
    if value is not None:
        return value, evaluation.get("label") or "FID"
    return evaluation["frechet_distance"], "Frechet distance"


def _grids(folder: Storage) -> list[tuple[int, str]]:
    """(step, picture as a data URL) of the grids that training left: the first, the last, and some between."""
    steps = [found["step"] for found in evaluations.results(folder)]
    if len(steps) > _GRIDS:
        steps = [steps[round(i * (len(steps) - 1) / (_GRIDS - 1))] for i in range(_GRIDS)]
    return [(step, _small(folder.read(f"step-{step:08d}.png"))) for step in steps]


def _small(png: bytes) -> str:
    """A picture as a data URL; a wide one as a smaller JPEG, since a page holds several."""
    picture = Image.open(io.BytesIO(png))
    if picture.width <= _GRID_PIXELS:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    picture = picture.convert("RGB")
    picture.thumbnail((_GRID_PIXELS, 4 * _GRID_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scores(evaluated: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluations beside training: a drawing of the distance, and a table of all numbers."""
    if not evaluated:
        return {"scores": None}
    metric = next((m for m in _NAMES if any(m in line for line in evaluated)), None)
    columns = sorted({name for line in evaluated for name in line} - {"step", EVALUATED, "evaluation_s"})
    drawn = [line for line in evaluated if metric in line]
    return {
        "scores": evaluated, "score_columns": columns, "images_of": EVALUATED,
        "scores_plot": scores_plot(drawn, metric, _NAMES[metric]) if metric else None,
    }  # fmt: skip


def _phases(metrics: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(phase, its median seconds in a step, its share of a step) as far as they were logged."""
    known = [m for m in metrics if all(f"{phase}_s" in m for phase in _PHASES)]
    if not known:
        return []
    step = median(m["step_s"] for m in known)
    found = [(phase, median(m[f"{phase}_s"] for m in known)) for phase in _PHASES]
    rest = max(0.0, step - sum(seconds for _, seconds in found))
    return [(phase, seconds, seconds / step) for phase, seconds in (*found, ("other", rest))]


def _lost(last: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """(what for, seconds if known, share) of the time since the last command began: steps that stand, and losses."""
    if "goodput" not in last:
        return []
    causes = [(text, last[f"lost_{cause}_s"]) for cause, text in _LOSSES.items() if f"lost_{cause}_s" in last]
    total = sum(seconds for _, seconds in causes)
    share = (1 - last["goodput"]) / total if total else 0.0
    return [("steps that stand", None, last["goodput"]), *((text, s, s * share) for text, s in causes)]


def _events(run: Storage) -> list[tuple[str, str, str]]:
    """(time, kind, text) of the newest, oldest first."""
    return [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(e["time"])), e["event"], e.get("text", ""))
        for e in read_events(run)[-_EVENTS:]
    ]


def _grid_text(made: dict[str, Any]) -> str:
    columns = ", ".join(made.get("grid_classes", made["classes"][:10]))
    weights = "EMA weights" if made["weights"] == "ema" else "raw weights"
    return (
        f"One column per class ({columns}): {weights} of step {made['step']}, "
        f"{made['method']} in {made['steps']} steps, "
        f"guidance {made['guidance_scale']} on {made['guidance_channels']} channels, seed {made['seed']}."
    )


def _facts(made: dict[str, Any] | None, evaluation: dict[str, Any] | None) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    if made:
        keys = ("checkpoint", "step", "weights", "method", "steps", "guidance_scale", "guidance_channels",
                "guidance_interval", "labels", "seed", "precision", "codec_precision")  # fmt: skip
        shown = {key: "unset" if made[key] is None else made[key] for key in keys if key in made}
        facts += [(f"samples: {key.replace('_', ' ')}", value) for key, value in shown.items()]
        facts += [("autoencoder", f"{made['codec']['vae']} (hash {made['codec']['hash'] or 'not known'})")]
    if evaluation:
        record = evaluation["provenance"]
        facts += [("feature network", f"{evaluation['features']} (hash {record['features']})")]
        real = evaluation["reference_images"] or "an unknown number of"
        facts += [("reference", f"{record['reference']} ({real} images)")]
        facts += [("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items()))]
    return facts
