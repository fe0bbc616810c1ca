"""A sweep's figures, by matplotlib: loss by learning rate, optimum by scale, loss by compute."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dico_ray.arithmetic import parameter_count
from dico_ray.scaling.summary import Found, Result, smoothed

_COLOURS = ("#1f4e86", "#c2571a", "#2f7d4f", "#7b3f8c", "#a8892c", "#4d4d4d")

_MARKS = (("*", "o", "-"), ("P", "s", "--"), ("X", "D", ":"))  # by value of sweep.compare

_TALLEST = 1.25  # times the lowest loss: higher ones are shown at the edge


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def loss_by_rate(axes: Any, found: Found, verified: Result | None = None) -> None:
    """Each scale's trials, the parabola through those nearest to the best, and its lowest point.

    Triangles at the upper edge: trials above it, or diverged.
    """
    for i, scale in enumerate(found.scales):
        ended = [r for r in scale.results if r.complete and np.isfinite(r.value)]
        early = [r for r in scale.results if not r.complete and np.isfinite(r.value)]
        axes.plot([r.trial.lr for r in ended], [r.value for r in ended], "o", color=_colour(i), label=scale.scale, ms=5)
        axes.plot([r.trial.lr for r in early], [r.value for r in early], "o", color=_colour(i), mfc="none", ms=5)
        if o := scale.optimum:
            used = sorted(r.trial.lr for r in scale.fitted if np.isfinite(r.value))
            x = np.geomspace(used[0], used[-1], 100)
            y = o.loss + o.curvature / 2 * np.log(x / o.lr) ** 2
            shown = y < min(r.value for r in ended) * _TALLEST
            axes.plot(x[shown], y[shown], color=_colour(i), lw=1.2)
            axes.plot([o.lr], [o.loss], "*", color=_colour(i), ms=11, mec="white", mew=0.8)
    if verified:
        axes.plot([verified.trial.lr], [verified.value], "x", color="black", ms=8, mew=2, label="winner, trained")
    values = [r.value for s in found.scales for r in s.results if np.isfinite(r.value)]
    low, high = min(values), max(min(values) * _TALLEST, max(s.best.value for s in found.scales) * 1.05)
    above = [r for s in found.scales for r in s.results if not r.value < high]
    if above:  # without points, what is not clipped would take room far outside
        axes.plot([r.trial.lr for r in above], [high] * len(above), "^", color="#7d8794", ms=7, clip_on=False)
    axes.set_ylim(low - 0.06 * (high - low), min(high, max(values) * 1.02) if not above else high)
    title = f"loss by learning rate{found.kind and ', '}{found.kind}"
    axes.set(xscale="log", xlabel="learning rate", ylabel=found.metric, title=title)
    axes.legend(frameon=False, fontsize=8)


def optimum_by_scale(axes: Any, found: Found, verified: Result | None = None) -> None:
    """Each scale's best learning rate with its interval, and the power law through them with its band.

    With sweep.compare: for each value, in a style of its own.
    """
    for found_, marks in zip(found.every, itertools.cycle(_MARKS), strict=False):
        _optima(axes, found_, *marks)
    if found.kinds:
        axes.legend(frameon=False, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="best learning rate", title="optimum by scale")


def _optima(axes: Any, found: Found, fitted: str, tried: str, line: str) -> None:
    """fitted, tried: markers of optima, and of best trials where nothing was fitted; line: the law's style."""
    sizes = [parameter_count(s.config.model) for s in found.scales]
    for i, (scale, size) in enumerate(zip(found.scales, sizes, strict=True)):
        rate, _ = scale.expected
        axes.plot([size], [rate], fitted if scale.trusted else tried, color=_colour(i), ms=11)
        if scale.trusted and scale.trusted.interval:
            axes.plot([size, size], scale.trusted.interval, color=_colour(i), lw=1.2, ls=line)
    if found.line:
        x = np.geomspace(min(sizes) / 1.5, max(sizes) * 1.5, 60)
        axes.plot(x, [found.line.at(v) for v in x], color="#5a6675", lw=1, ls=line)
        if len(found.line.draws):
            low, high = np.array([found.line.interval(v) for v in x]).T
            axes.fill_between(x, low, high, color="#5a6675", alpha=0.15, lw=0)
    if found.kind:
        label = f"{found.kind}: {found.octaves:.1f} octaves apart"
        axes.plot([], [], marker=fitted, ls=line, color="#5a6675", ms=9, label=label)


def loss_by_compute(axes: Any, found: Found, verified: Result | None = None) -> None:
    """All trials' curves, the frontier, and the power law fitted to it with its band."""
    for i, scale in enumerate(found.scales):
        for result in scale.results:
            curve = smoothed(result, found.config.sweep.tail) if len(result.curve) else np.empty((0, 2))
            axes.plot(curve[:, 0], curve[:, 1], color=_colour(i), lw=0.6, alpha=0.45)
    compute, loss = found.frontier
    axes.plot(compute, loss, "o", color="black", ms=3, label="frontier")
    if found.law:
        x = np.geomspace(compute[0], compute[-1] * 4, 100)
        low, high = found.law.band(x)
        axes.fill_between(x, low, high, color="#5a6675", alpha=0.2, lw=0)
        text = f"{found.law.floor:.3g} + {found.law.scale:.3g} (C / {found.law.unit:.2g})^-{found.law.exponent:.2g}"
        axes.plot(x, found.law.at(x), color="#5a6675", lw=1.2, label=text)
    if len(loss):
        top = np.quantile(np.concatenate([loss, [s.best.value for s in found.scales]]), 1.0)
        axes.set_ylim(loss.min() * 0.85, top * 1.15)
    title = f"loss by compute{found.kind and ', '}{found.kind}"
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=found.metric, title=title)
    axes.legend(frameon=False, fontsize=8)


_Shown = tuple[Callable[..., None], Found, Result | None]

PANELS: tuple[Callable[..., None], ...] = (loss_by_rate, optimum_by_scale, loss_by_compute)


def svg(panel: Callable[..., None], found: Found, verified: Result | None) -> str:
    """One panel as an SVG element; of losses by learning rate, one for each value of sweep.compare, side by side."""
    shown = _shown([panel], found, verified)
    figure = _figure((6.4 if len(shown) == 1 else 4.6 * len(shown), 3.8))
    _draw_all(figure, shown)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(found: Found, verified: Result | None) -> bytes:
    """All panels side by side."""
    shown = _shown(PANELS, found, verified)
    figure = _figure((13.5, 4) if len(shown) == len(PANELS) else (4 * len(shown), 4))
    _draw_all(figure, shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _shown(panels: Sequence[Callable[..., None]], found: Found, verified: Result | None) -> list[_Shown]:
    """Each panel with what it shows: that of losses by learning rate comes once for each value of sweep.compare."""
    each = [(loss_by_rate, kind, verified if kind.kind == found.kind else None) for kind in found.every]
    return [row for panel in panels for row in (each if panel is loss_by_rate else [(panel, found, verified)])]


def _draw_all(figure: Any, shown: list[_Shown]) -> None:
    """Axes of the same panel share their limits, so that the eye may compare them."""
    drawn = list(zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True))
    for axes, (panel, found, verified) in drawn:
        _draw(axes, panel, found, verified)
    alike = [axes for axes, (panel, *_) in drawn if panel is loss_by_rate]
    for axes in alike:
        axes.set_xlim(min(a.get_xlim()[0] for a in alike), max(a.get_xlim()[1] for a in alike))
        axes.set_ylim(min(a.get_ylim()[0] for a in alike), max(a.get_ylim()[1] for a in alike))


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "dico-ray"
    return Figure(figsize=size, layout="constrained")


def _draw(axes: Any, panel: Callable[..., None], found: Found, verified: Result | None) -> None:
    from matplotlib.ticker import NullFormatter

    panel(axes, found, verified)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.title.set_fontsize(10)
