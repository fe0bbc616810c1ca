"""ZeRO-2's gradients: every micro-batch's, summed over the ranks into the part that a rank owns (arXiv 1910.02054, 5).

Takes the place of DeepSpeed 0.19's own sums, which copy, slice and add each parameter's gradient by itself and, on
several ranks, wait for the device after every micro-batch: with DiCo-H on one H100 33 ms of a micro-batch's 259. And of
its norm, before which it looks for numbers that are not finite in each parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Gradients = list[tuple[nn.Parameter, int, Tensor]]  # with the parameter's group


@dataclass(frozen=True)
class _Plan:
    """What becomes of certain gradients that are sent together.

    cuts: (which gradient, from, to; None for all of it), in the order of `places`, where they are copied or, on one
    rank, added to. parts: who owns which range of the bucket. sums: what this rank adds of it, and where to.
    """

    cuts: list[tuple[int, tuple[int, int] | None]]
    places: list[Tensor]
    parts: list[tuple[int, Tensor]]
    sums: list[tuple[Tensor, Tensor]]


class PartitionedGradients:
    """Collects gradients as they come; a bucket of them at a time is sent to the ranks that own them.

    Sums are fp32, over ranks and micro-batches. On GPUs it all happens on a stream of its own, behind the backward
    pass; a gradient is let go as soon as its bucket is on the way. Hooks run between the passes of two stages, while
    the GPU may have little left to do: so they only collect, and what becomes of a bucket is worked out once.
    """

    def __init__(self, optimizer: Any, bucket_elements: int, reduce: Callable[..., Any]) -> None:
        """optimizer: DeepSpeed's of stage 2, whose hooks on parameters give way to this one's.

        bucket_elements: how many gradients are collected before they are sent, 4 bytes each. reduce: as
        torch.distributed's, over the ranks that share the state.
        """
        for name in ("check_overflow", "scaled_global_norm", "overlapping_partition_gradients_reduce_epilogue"):
            assert callable(getattr(optimizer, name, None)), f"DeepSpeed calls {name} otherwise now"
        self._optimizer = optimizer
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._sum_up = reduce
        self._sizes = [int(size) for size in optimizer.partition_size]
        self._offsets = {
            parameter: int(offset)
            for parameters, offsets in zip(
                optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
            for parameter, offset in zip(parameters, offsets, strict=True)
        }
        self._sums = [optimizer._build_compact_grad_partition_buffer(group) for group in range(len(self._sizes))]
        self._flat: list[Tensor] = [built.flat_partition for built in self._sums]
        self._new = False  # whether the sums are another step's
        self._pending: _Gradients = []
        self._elements, self._most = 0, max(bucket_elements, *(p.numel() for p in self._offsets))
        self._plans: dict[tuple[int, ...], _Plan] = {}
        device = self._flat[0].device
        total = sum(parameter.numel() for parameter in self._offsets)
        self._bucket = torch.empty(min(self._most, total) if self._world_size > 1 else 0, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._producers: set[torch.cuda.Stream] = set()  # hooks may run on several streams
        # DeepSpeed's hooks count, at the first one of each backward pass, all parameters that it will reach.
        hooks = optimizer._grad_acc_hooks  # closing the engine removes what is in it
        assert len(hooks) == len(self._offsets), "DeepSpeed has other hooks on gradients now"
        for hook in hooks:
            hook.remove()
        hooks[:] = [
            parameter.register_post_accumulate_grad_hook(partial(self._collect, group))
            for group, parameters in enumerate(optimizer.round_robin_bit16_groups)
            for parameter in parameters
        ]
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._finish
        optimizer.check_overflow = lambda **_: None  # its step asks the norm as well whether gradients are finite
        optimizer.scaled_global_norm = self._norm

    def _collect(self, group: int, parameter: nn.Parameter) -> None:
        """A parameter's gradient is there."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        count = gradient.numel()
        if self._elements + count > self._most:
            self._send()
        self._pending.append((parameter, group, gradient))
        self._elements += count
        if self._stream:
            gradient.record_stream(self._stream)
            self._producers.add(torch.cuda.current_stream(gradient.device))

    def _finish(self) -> None:
        """A micro-batch's gradients are all there (DeepSpeed's call after each backward pass)."""
        self._send()
        if self._stream:  # before the next forward pass: gradients that graphs lend are overwritten from there on
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if self._optimizer.is_gradient_accumulation_boundary():
            for group, built in enumerate(self._sums):
                self._optimizer.averaged_gradients[group] = built
            self._new = True
        self._optimizer._epilogue_ran_this_backward = True

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Of the global batch's gradients, over all ranks, not clipped; not finite where one of them is not."""
        parts = [part for built in self._sums for part in built]
        # On a CPU float32's sums lose a thousandth over 20 million elements; a GPU's are made of small ones.
        dtype = torch.float64 if self._stream is None else None
        norms = torch._foreach_norm(parts, 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
        square = torch.stack(norms).square().sum()
        if self._world_size > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    @torch.no_grad()
    def _send(self) -> None:
        pending, self._pending, self._elements = self._pending, [], 0
        if self._stream:
            for producer in self._producers:
                self._stream.wait_stream(producer)
        if not pending:
            return
        with self._aside():
            if self._new:
                for flat in self._flat:
                    flat.zero_()
                self._new = False
            key = tuple(id(parameter) for parameter, _, _ in pending)
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = self._planned(pending)
            gradients = [gradient.reshape(-1) for _, _, gradient in pending]
            cut = [gradients[i] if span is None else gradients[i][slice(*span)] for i, span in plan.cuts]
            if self._world_size == 1:
                torch._foreach_add_(plan.places, cut)  # pyright: ignore[reportPrivateImportUsage]
                return
            torch._foreach_copy_(plan.places, cut)  # pyright: ignore[reportPrivateImportUsage]
            work = [self._sum_up(part, owner, async_op=True) for owner, part in plan.parts]
            for one in work:
                one.wait()
            for sums, part in plan.sums:
                sums.add_(part, alpha=1 / self._world_size)

    def _aside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _planned(self, pending: _Gradients) -> _Plan:
        """Sorted by owner, so that each one's part of the bucket is one range, and by place in its sums."""
        pieces = sorted(self._dealt(pending), key=lambda piece: piece[:3])
        lengths = [stop - start for *_, (start, stop) in pieces]
        cuts: list[tuple[int, tuple[int, int] | None]] = [
            (i, None if span == (0, pending[i][2].numel()) else span) for *_, i, span in pieces
        ]
        if self._world_size == 1:
            places = [
                self._flat[group].narrow(0, place, length)
                for (group, _, place, *_), length in zip(pieces, lengths, strict=True)
            ]
            return _Plan(cuts, places, [], [])
        ends = [0, *accumulate(lengths)]
        parts, sums = [], []
        for first, after in _runs([(group, owner) for group, owner, *_ in pieces]):
            parts.append((pieces[first][1], self._bucket[ends[first] : ends[after]]))
        for first, after in _runs(
            [(group, owner, place - ends[k]) for k, (group, owner, place, *_) in enumerate(pieces)]
        ):
            group, owner, place, *_ = pieces[first]
            if owner == self._rank:  # what lies side by side there and here is added at once
                part = self._bucket[ends[first] : ends[after]]
                sums.append((self._flat[group].narrow(0, place, part.numel()), part))
        return _Plan(cuts, list(self._bucket[: ends[-1]].split(lengths)), parts, sums)

    def _dealt(self, pending: _Gradients) -> Iterator[tuple[int, int, int, int, tuple[int, int]]]:
        """The gradients cut where owners change: group, owner, place in the owner's part, which gradient, its span."""
        for i, (parameter, group, gradient) in enumerate(pending):
            offset, start, end = self._offsets[parameter], 0, gradient.numel()
            while start < end:
                owner, place = divmod(offset + start, self._sizes[group])
                stop = min(end, start + self._sizes[group] - place)
                yield group, owner, place, i, (start, stop)
                start = stop


def _runs(keys: list[Any]) -> list[tuple[int, int]]:
    """Ranges [first, after) of equal keys side by side."""
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(zip(starts, [*starts[1:], len(keys)], strict=True))
