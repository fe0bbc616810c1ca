"""The report's drawings: a run's numbers -> SVG elements that need nothing else."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dico_ray.config import ARCHITECTURES, Model
from dico_ray.training.telemetry import EVALUATED

_PALE, _LINE, _OTHER, _THIRD = "#b8c7da", "#1f4e86", "#b3541e", "#4b7f52"
_PUBLISHED_LATENTS = 32  # the published curves are of 256-pixel images
_MOST_OF_LAST = 2  # the loss axis ends at so many times the last loss: the first steps' are beyond
_STEPS = EngFormatter(sep="")  # 400k
_WIDTH_INCHES, _LOG_RANGE = 8.0, 20  # steps are drawn on a logarithmic axis where they span more than so many times

_PANELS: tuple[tuple[str, str], ...] = (
    ("images_per_s", "images/s"),
    ("mfu", "MFU"),
    ("tflops_per_worker", "TFLOP/s per worker"),
    ("data_wait", "share of time waiting for data"),
    ("rank_skew", "slowest worker over the mean"),
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("memory_gb", "GPU memory, GB"),
    ("object_store_mb", "object store, MB"),
)


def published(model: Model) -> list[tuple[int, float]]:
    """The published training loss (step, loss) of a row of the family, DiCo-S, B, L or XL at 256 pixels; else none.

    Source: the paper's released logs (arXiv 2505.11196), each point a mean over the steps since the one before.
    """
    if model.architecture != ARCHITECTURES[model.name] or model.latent_size != _PUBLISHED_LATENTS:
        return []
    with Path(__file__).with_name("loss_curves.csv").open(encoding="utf-8") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["model"] == model.name]


def loss_plot(metrics: list[dict[str, Any]], model: Model) -> str:
    """Loss by step, the published one beside it, and the loss on held-out latents where it was taken.

    The line is a mean over the last tenth of the steps so far. metrics: at least one line.
    """
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    smooth = _running_mean(losses)
    figure, axes = _figure(3.4)
    axes.plot(steps, losses, color=_PALE, linewidth=1, label="as logged")
    axes.plot(steps, smooth, color=_LINE, linewidth=1.8, label="mean of the last tenth")
    reference = [(step, loss) for step, loss in published(model) if step <= 1.5 * steps[-1]]
    if reference:
        axes.plot(*zip(*reference, strict=True), color=_OTHER, linewidth=1.4, label=f"published, {model.name}")
    held_out = [(m["step"], m["val_loss"]) for m in metrics if "val_loss" in m]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_THIRD, marker=".", linewidth=1.4, label="EMA, held out")
    logarithmic = steps[-1] > _LOG_RANGE * steps[0]
    axes.set(xlabel="step", ylabel="loss (MSE + VB)", xscale="log" if logarithmic else "linear")
    axes.xaxis.set_major_formatter(_STEPS)
    shown = [*losses, *(loss for _, loss in (*reference, *held_out))]
    axes.set_ylim(min(shown) * 0.95, min(max(shown) * 1.05, _MOST_OF_LAST * smooth[-1]))
    axes.legend(frameon=False)
    return _svg(figure, "loss")


def scores_plot(evaluated: list[dict[str, Any]], metric: str, name: str) -> str:
    """An evaluation's metric by step; numbers of different image counts are different lines, and say so.

    evaluated: lines that have the metric, by step. name: of the metric, for people.
    """
    figure, axes = _figure(3.0)
    for count in sorted({line[EVALUATED] for line in evaluated}):
        line = [(e["step"], e[metric]) for e in evaluated if e[EVALUATED] == count]
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=1.5, label=f"{name}, {count:,} images")
    axes.set(xlabel="step", ylabel=name)
    axes.xaxis.set_major_formatter(_STEPS)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure, "scores")


def telemetry_plot(metrics: list[dict[str, Any]]) -> str:
    """Small drawings of what was logged of speed, data, memory and gradients, by step."""
    panels = [(key, title) for key, title in _PANELS if any(key in m for m in metrics)]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(_WIDTH_INCHES, 1.7 * max(1, rows)))
    for i, (key, title) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, i + 1)
        line = [(m["step"], m[key]) for m in metrics if key in m]
        axes.plot(*zip(*line, strict=True), color=_LINE, linewidth=1.1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_formatter(_STEPS)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.16 / rows, top=1 - 0.16 / rows, wspace=0.3, hspace=0.55)
    return _svg(figure, "telemetry")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    return figure, axes


def _running_mean(values: list[float]) -> list[float]:
    """At each value the mean of the last ones, a tenth of all so far: as smooth anywhere on a logarithmic axis."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    widths = np.maximum(1, ends // 10)
    return ((sums[ends] - sums[ends - widths]) / widths).tolist()


def _svg(figure: Figure, salt: str) -> str:
    """salt: makes the names in a drawing differ from those in another one on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
