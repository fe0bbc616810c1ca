"""Where a step's time goes: the profiler's kernels by kind, and what lies idle between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# The first line whose pattern is in a kernel's name (or, on a CPU, an operator's) tells its class.
CLASSES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    ("EMA", r"lerp"),
    ("optimizer", r"adam"),
    ("gradients' sums", r"multi_tensor_apply|_foreach"),  # those that are made of many tensors at once
    ("depthwise", r"depthwise|_c1_k1_|dwconv"),
    ("attention", r"flash|fmha|scaled_dot_product|_attention_"),
    ("normalisation and modulation", r"adaln|layer_norm|var_mean|welford"),
    ("matrix products", r"gemm|gemv|cutlass|nvjet|cublas|splitk|xmma|wgmma|cudnn|convolution|conv2d|addmm|::mm|::bmm|"
                        r"::linear|implicit|_linear_gelu"),
    ("reductions", r"reduce|triton_red|triton_per|::sum|::mean"),
    ("copies", r"memcpy|memset|copy|catarray|::cat|transpose"),
    ("elementwise", r""),
)  # fmt: skip
IDLE = "idle"


def class_of(name: str) -> str:
    """A kernel's or operator's class, by its name."""
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE))


def by_class(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by class, and idle: from the first kernel's start to the last one's end, without them.

    On a CPU: operators' own time, and no idle time.
    """
    gpu = device.type == "cuda"
    # Of a GPU's steps kernels alone: a stage-3 step has hundreds of thousands of operators, which take minutes to read.
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.events()
    assert events is not None
    if gpu:
        on_gpu = [event for event in events if event.device_type.name == "CUDA"]
        return _kernels([event for event in on_gpu if not event.is_user_annotation])
    totals: dict[str, float] = {}
    for event in events:
        totals[class_of(event.name)] = totals.get(class_of(event.name), 0.0) + event.self_cpu_time_total / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _kernels(events: list[FunctionEvent]) -> dict[str, float]:
    totals: dict[str, float] = {}
    busy, end = 0.0, float("-inf")
    begin = min(event.time_range.start for event in events)
    for event in sorted(events, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        kind = class_of(event.name)
        totals[kind] = totals.get(kind, 0.0) + (stop - start) / 1e3
        busy += max(0.0, stop - max(start, end)) / 1e3
        end = max(end, stop)
    return {**dict(sorted(totals.items(), key=lambda item: -item[1])), IDLE: (end - begin) / 1e3 - busy}
