"""Judges GPUs by what `nvidia-smi -q -x` reports of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from dico_ray.operate.examine.findings import Finding, Verdict, good, unless

_BUSY_BYTES = 2e9  # a driver and its contexts take less
#          what slows a GPU down: name in the report, verdict, mend
_SLOWED: tuple[tuple[str, Verdict, str], ...] = (
    ("hw_thermal_slowdown", "bad", "it is too hot: see the node's cooling, or take it out"),
    ("hw_power_brake_slowdown", "bad", "the node's power supply brakes it: see its feeds, or take it out"),
    ("hw_slowdown", "bad", "the hardware slows it down: see `nvidia-smi -q -d PERFORMANCE`, or take the node out"),
    ("sw_thermal_slowdown", "warning", "it is near its heat limit: see the node's cooling"),
)  # fmt: skip


def judge(reports: Mapping[str, str | None], expected: Mapping[str, float]) -> list[Finding]:
    """reports: each node's XML, None without a driver; expected: GPUs that Ray counts on each node."""
    found: list[Finding] = []
    drivers: dict[str, str] = {}
    for node, text in reports.items():
        if not expected.get(node):
            continue
        if text is None:
            found.append(Finding("GPU health", node, "unknown", "nvidia-smi does not answer",
                                 "put NVIDIA's driver utilities into the image to have GPUs examined"))  # fmt: skip
            continue
        report = ElementTree.fromstring(text)
        drivers[node] = _text(report, "driver_version")
        for number, gpu in enumerate(report.findall("gpu")):
            found += _judge_one(gpu, node, number)
    if drivers:
        same = len(set(drivers.values())) == 1
        told = next(iter(drivers.values())) if same else ", ".join(f"{n}: {d}" for n, d in drivers.items())
        found.append(unless(None if same else "warning", "GPU driver", "", told, "give all nodes the same driver"))
    return found


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _judge_one(gpu: ElementTree.Element, node: str, number: int) -> list[Finding]:
    name = f"GPU {number} ({_text(gpu, 'product_name')})"
    faults = [*_memory_faults(gpu), *_slow(gpu), *_busy(gpu)]
    if not faults:
        return [good("GPU health", node, f"{name}: {_text(gpu, 'temperature/gpu_temp')}, no errors, not slowed down")]
    return [Finding("GPU health", node, verdict, f"{name}: {found}", mend) for verdict, found, mend in faults]


def _memory_faults(gpu: ElementTree.Element) -> list[tuple[Verdict, str, str]]:
    errors = sum(
        int(count.text or 0)
        for part in gpu.findall("ecc_errors/volatile")
        for count in part
        if "uncorrectable" in count.tag and (count.text or "").strip().isdigit()
    )
    found: list[tuple[Verdict, str, str]] = []
    if errors:
        found.append(("bad", f"{errors} uncorrectable memory errors since the driver started",
                      "reset the GPU or take the node out: what it computes cannot be trusted"))  # fmt: skip
    if _text(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        found.append(("bad", "its memory has no spare rows left", "have the GPU replaced"))
    elif _text(gpu, "remapped_rows/remapped_row_pending") == "Yes":
        found.append(("bad", "memory rows wait to be remapped", "reset the GPU (a reboot does)"))
    return found


def _slow(gpu: ElementTree.Element) -> list[tuple[Verdict, str, str]]:
    """Newer drivers say clocks_event_reasons, older ones clocks_throttle_reasons."""
    active = {
        re.sub(r"clocks_(event|throttle)_reason_", "", reason.tag)
        for kind in ("clocks_event_reasons", "clocks_throttle_reasons")
        for reason in gpu.findall(f"{kind}/*")
        if (reason.text or "").strip() == "Active"
    }
    return [(verdict, f"slowed down ({reason})", mend) for reason, verdict, mend in _SLOWED if reason in active]


def _busy(gpu: ElementTree.Element) -> list[tuple[Verdict, str, str]]:
    used = _text(gpu, "fb_memory_usage/used").split()
    size = float(used[0]) * 2**20 if used and used[0].isdigit() else 0.0
    if size < _BUSY_BYTES:
        return []
    return [
        ("warning", f"{size / 1e9:.1f} GB of its memory are taken", "see with nvidia-smi who uses it, and stop that")
    ]
