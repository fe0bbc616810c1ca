"""What was found: a line with a verdict, and the mend where it is not good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Verdict = Literal["good", "warning", "bad", "unknown"]
_COLOURS: dict[str, str] = {"good": "green", "warning": "yellow", "bad": "red", "unknown": "cyan"}


@dataclass(frozen=True)
class Finding:
    """check: what was looked at; where: on which node, '' for the cluster; found: what it was, in one line.

    bad: a run would fail or waste what it pays for. warning: it may. unknown: it could not be examined, and why.
    """

    check: str
    where: str
    verdict: Verdict
    found: str
    mend: str = ""


def good(check: str, where: str, found: str) -> Finding:
    return Finding(check, where, "good", found)


def unless(fault: Verdict | None, check: str, where: str, found: str, mend: str) -> Finding:
    """The finding of that fault, with its mend; a good one where there is none."""
    return Finding(check, where, fault, found, mend) if fault else good(check, where, found)


def table(findings: Sequence[Finding]) -> Table:
    """Verdicts and mends for people."""
    drawn = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("check", "node", "verdict", "found", "what to do"):
        drawn.add_column(title, overflow="fold")
    for f in findings:
        drawn.add_row(f.check, f.where, f"[{_COLOURS[f.verdict]}]{f.verdict}[/]", f.found, f.mend)
    return drawn


def show(findings: Sequence[Finding]) -> None:
    """In a terminal a table of its width; elsewhere wide lines, which logs keep whole."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table(findings), markup=False)


def to_json(findings: Sequence[Finding], about: dict[str, Any]) -> str:
    """For machines. about: what was examined."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _COLOURS}
    return json.dumps({**about, "verdicts": counts, "findings": [asdict(f) for f in findings]}, indent=1)
