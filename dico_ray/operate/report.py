"""`dico-ray report`: a run -> one HTML file without outside resources: loss, samples, numbers, settings."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config, ConfigError
from dico_ray.evaluate import result_file
from dico_ray.sample import GRID, RECORD, output_folder
from dico_ray.settings import build, read_yaml
from dico_ray.storage import Storage
from dico_ray.train import CONFIG
from dico_ray.training.telemetry import read_metrics

REPORT = "report.html"


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray report`: writes report.html into the run's folder. Samples and evaluation appear where they exist.

    Raises ConfigError if the run has logged nothing.
    """
    run = Storage(config.run.folder)
    metrics = read_metrics(run)
    if not metrics:
        raise ConfigError(f"run.name: {config.run.folder} has no metrics; train it, or name another run")
    run.write(REPORT, render(config, run, metrics).encode())
    print(f"report: {run.path(REPORT)}")


def render(config: Config, run: Storage, metrics: list[dict[str, Any]]) -> str:
    """The page, from what lies in the run's folder."""
    trained = _trained_config(config, run)
    samples = output_folder(config)
    made = _json(samples, RECORD)
    evaluation = _json(*result_file(config))
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    judged = evaluation["judge"] if evaluation else None
    return (
        Environment(autoescape=True)
        .from_string(page)
        .render(
            name=config.run.name,
            folder=run.url,
            config=trained,
            model=trained.model.name,
            parameters=parameter_count(trained.model),
            last=metrics[-1],
            rate=median(m["images_per_s"] for m in metrics),
            loss_plot=loss_plot(metrics),
            grid=base64.b64encode(samples.read(GRID)).decode() if made else None,
            grid_text=_grid_text(made) if made else "",
            evaluation=evaluation,
            by_class=list(judged["by_class"].items()) if judged else [],
            facts=_facts(made, evaluation),
            settings=trained.to_yaml(),
        )
    )


def _trained_config(config: Config, run: Storage) -> Config:
    """The settings that the run was trained with, as it wrote them."""
    if run.is_local:
        return build(read_yaml(run.path(CONFIG)))
    import yaml

    return build(yaml.safe_load(run.read(CONFIG)))


def _json(storage: Storage, name: str) -> dict[str, Any] | None:
    return json.loads(storage.read(name)) if storage.exists(name) else None


def _grid_text(made: dict[str, Any]) -> str:
    columns = ", ".join(made["classes"][:10])
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
        facts += [(f"samples: {key.replace('_', ' ')}", made[key]) for key in keys]
        facts += [("autoencoder", f"{made['codec']['vae']} (hash {made['codec']['hash'] or 'not known'})")]
    if evaluation:
        record = evaluation["provenance"]
        facts += [("feature network", f"{evaluation['features']} (hash {record['features']})")]
        facts += [("reference", f"{record['reference']} ({evaluation['reference_images']} images)")]
        facts += [("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items()))]
    return facts


def loss_plot(metrics: list[dict[str, Any]]) -> str:
    """Loss by step -> an SVG element. The line is a running mean over a tenth of the points."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "dico-ray"
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    width = max(1, len(losses) // 10)
    smooth = [sum(losses[max(0, i - width + 1) : i + 1]) / len(losses[max(0, i - width + 1) : i + 1])
              for i in range(len(losses))]  # fmt: skip
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#b8c7da", linewidth=1, label="as logged")
    axes.plot(steps, smooth, color="#1f4e86", linewidth=1.8, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss (MSE + VB)", xscale="log" if steps[-1] > 20 * steps[0] else "linear")
    axes.set_ylim(min(losses) * 0.9, sorted(losses)[-max(1, len(losses) // 20)] * 1.1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
