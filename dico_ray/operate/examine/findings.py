"""What was found: a line with a verdict, and the mend where it is not good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
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
    """A line a finding."""
    drawn = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("check", "node", "verdict", "found"):
        drawn.add_column(title, overflow="fold")
    for f in findings:
        drawn.add_row(escape(f.check), escape(f.where), f"[{_COLOURS[f.verdict]}]{f.verdict}[/]", escape(f.found))
    return drawn


def show(findings: Sequence[Finding]) -> None:
    """The table, and below it what to do, a line each. In a terminal of its width; logs keep wide lines whole."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table(findings))
    mends: dict[str, list[str]] = {}
    for f in findings:
        if f.mend:
            mends.setdefault(f"{f.check} ({f.verdict}): {f.mend}", []).append(f.where)
    for mend, nodes in mends.items():
        on = ", ".join(node for node in nodes if node)
        console.print(f"{mend}{f' [{on}]' if on else ''}", markup=False, highlight=False, soft_wrap=True)


def to_json(findings: Sequence[Finding], about: dict[str, Any]) -> str:
    """For machines. about: what was examined."""
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _COLOURS}
    return json.dumps({**about, "verdicts": counts, "findings": [asdict(f) for f in findings]}, indent=1)
