"""A sweep's report: one HTML file without outside resources."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment

from dico_ray.scaling import figures
from dico_ray.scaling.summary import Found, Result, as_json


def render(found: Found, verified: Result | None) -> str:
    """The page of a sweep's results. verified: the winner as it was trained, if it was."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    told = as_json(found, verified)
    return (
        Environment(autoescape=True)
        .from_string(page)
        .render(
            name=found.config.run.name,
            told=told,
            plots=[figures.svg(panel, found, verified) for panel in figures.PANELS],
            settings=found.config.to_yaml(),
        )
    )
