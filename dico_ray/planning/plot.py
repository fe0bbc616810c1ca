"""The scaling forecast as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dico_ray.config import Config, ConfigError
from dico_ray.planning.scaling import Point

_KINDS = (".png", ".svg", ".pdf")
_PARTS = {
    "work_s": ("work", "#4c78a8"), "launches_s": ("launches", "#f2b701"),
    "communication_s": ("collectives, not hidden", "#e45756"), "update_s": ("optimizer and averages", "#9d9da1"),
}  # fmt: skip


def check_file(file: str) -> None:
    """Raises ConfigError for a kind of picture that `draw` does not write, or a folder that is not there."""
    path = Path(file)
    if path.suffix.lower() not in _KINDS:
        raise ConfigError(f"--plot {file}: write {', '.join(_KINDS[:-1])} or {_KINDS[-1]}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {file}: {path.parent} is no folder; name one that exists")


def draw(config: Config, points: list[Point], grown: list[Point], file: str) -> None:
    """Images/s by number of GPUs, and what a step of the run's own batch consists of.

    points: of the run's global batch. grown: of one that grows with the GPUs. Both as `scaling` gives them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    rates, parts = figure.subplots(1, 2)
    _rates(rates, config, points, grown)
    _parts(parts, config, points)
    figure.savefig(file, dpi=110)


def _rates(axes: Any, config: Config, points: list[Point], grown: list[Point]) -> None:
    own = config.train.world_sizes[0]
    first = points[0]
    axes.plot([p.workers for p in points], [p.images_per_s for p in points], "o-", color="#4c78a8",
              label=f"global batch {first.global_batch}")  # fmt: skip
    axes.plot([p.workers for p in grown], [p.images_per_s for p in grown], "s--", color="#54a24b",
              label="global batch grows with the GPUs")  # fmt: skip
    ends = [first.workers, max(p.workers for p in (*points, *grown))]
    axes.plot(
        ends, [first.images_per_s * size / first.workers for size in ends], ":", color="grey", label="in proportion"
    )
    axes.axvline(own, color="#bbbbbb", linewidth=1)
    axes.set(xlabel=f"{config.hardware.gpu} GPUs (line: the run's {own})", ylabel="images/s", yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_title(f"{config.model.name}, ZeRO-{config.train.zero_stage}: forecast")
    axes.legend()


def _parts(axes: Any, config: Config, points: list[Point]) -> None:
    names = [str(p.workers) for p in points]
    base = [0.0] * len(points)
    for field, (label, colour) in _PARTS.items():
        shares = [getattr(p, field) / p.step_s for p in points]
        axes.bar(names, shares, bottom=base, label=label, color=colour)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    for place, point in enumerate(points):
        axes.text(place, 1.01, f"{point.step_s:.2g} s", ha="center", fontsize=6.5)
    axes.set(ylim=(0, 1.08), xlabel=f"{config.hardware.gpu} GPUs", ylabel="share of a step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
