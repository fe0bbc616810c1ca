"""The network as CUDA graphs, which the host launches where it would launch thousands of kernels.

For passes with gradients, two graphs a stage (`StageGraphs`); for those without, one for all (`InferenceGraphs`).

A stage's forward and backward passes are captured once, for one shape of latents, and replayed from then on. All
stages' graphs share one pool of memory, and are replayed in the order of their capture, so together they take what one
plain pass takes; the gradients of the weights on top of it, which stay where the captured passes put them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_WARM_UPS = 2  # the first compiles, loads and chooses kernels, none of which a capture may do
_SHAPES = 4  # of inputs, such as those of guided and of unguided passes


@dataclass
class Captured:
    """A stage's two graphs, and the tensors where they find their inputs and leave their results.

    x, out, d_out `(B, H, W, C)`; condition `(B, C)`; gradients: of x, condition and the weights, in order.
    """

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    x: Tensor
    condition: Tensor
    out: Tensor
    d_out: Tensor
    gradients: tuple[Tensor, ...]
    lend: bool
    replays: int = 0


class StageGraphs:
    """Captures stages at the first pass that takes gradients, and replays them in those of that shape that follow.

    Passes of other shapes, and those without gradients, run as they would without graphs.

    stages: modules of (x, condition) -> like x. lend: whether the weights' gradients may be handed out where they lie,
    where the next pass, forward or backward, may overwrite them: true for whoever has added them to a sum by then.
    """

    def __init__(self, stages: Sequence[nn.Module], lend: bool) -> None:
        self._stages, self._lend = list(stages), lend
        self._captured: dict[nn.Module, Captured] = {}
        self._key: Any = None

    def run(self, stage: nn.Module, x: Tensor, condition: Tensor) -> Tensor | None:
        """The stage's output `(B, H, W, C)`; None where no graph fits the call."""
        found = self._captured.get(stage)
        if found is None or not torch.is_grad_enabled() or (x.shape, x.dtype) != (found.x.shape, found.x.dtype):
            return None
        return _Replay.apply(found, x, condition, *stage.parameters())  # pyright: ignore[reportReturnType]

    def prepare(self, shapes: Sequence[tuple[int, int, int, int]], device: torch.device, dtype: torch.dtype) -> None:
        """Captures the stages for inputs `(B, H, W, C)`, one shape a stage, unless there are graphs already.

        The first shapes stay, whatever comes later; weights that have moved since are captured again. Nothing happens
        in passes without gradients.
        """
        if not torch.is_grad_enabled():
            return
        key = (device, dtype, *(p.data_ptr() for stage in self._stages for p in stage.parameters()))
        if key == self._key:
            return
        self._captured, self._key = {}, key
        torch.cuda.synchronize(device)
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        passes = [_Pass(stage, shape, device, dtype) for stage, shape in zip(self._stages, shapes, strict=True)]
        with torch.cuda.stream(stream):
            for one in passes:
                for _ in range(_WARM_UPS):
                    one.forward()
                    one.backward()
                one.forget()
        torch.cuda.synchronize(device)
        # Other threads use the GPU as well: only this one's calls have to be fit for a capture.
        how: Any = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        graphs = [(torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()) for _ in passes]
        for one, (forward, _) in zip(passes, graphs, strict=True):
            with torch.cuda.graph(forward, **how):
                one.forward()
        for one, (_, backward) in reversed(list(zip(passes, graphs, strict=True))):
            with torch.cuda.graph(backward, **how):
                one.backward()
        for stage, one, pair in zip(self._stages, passes, graphs, strict=True):
            self._captured[stage] = one.captured(*pair, self._lend)


@dataclass
class _Recorded:
    """A pass without gradients: where its graph finds its inputs and leaves its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor


class InferenceGraphs:
    """Captures a network's passes without gradients, a graph for each shape of inputs, and replays them.

    Graphs share one pool of memory, since nothing in it outlives a replay: together they hold what one pass takes. The
    first few shapes have graphs, others run as they would without.

    weights: the network's, where they stay: replays see values that change in place, and weights that have moved are
    captured again.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._recorded: dict[Any, _Recorded] = {}
        self._key: Any = None
        self._pool: Any = None

    def run(self, network: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`network(*inputs)`: always the same network, tensors on one GPU, one tensor out."""
        key = tuple(weight.data_ptr() for weight in self._weights)
        if key != self._key:
            self._recorded, self._key, self._pool = {}, key, torch.cuda.graph_pool_handle()
        shapes = tuple((given.shape, given.dtype, given.device) for given in inputs)
        found = self._recorded.get(shapes)
        if found is None:
            if len(self._recorded) >= _SHAPES:
                return network(*inputs)
            found = self._recorded[shapes] = self._record(network, inputs)
        for place, given in zip(found.inputs, inputs, strict=True):
            place.copy_(given)
        found.graph.replay()
        return found.out.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, network: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recorded:
        device = inputs[0].device
        places = tuple(given.clone() for given in inputs)  # what is made in inference mode could not be written later
        torch.cuda.synchronize(device)
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                network(*places)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = network(*places)
        return _Recorded(graph, places, out)


class _Pass:
    """One stage's plain pass, on inputs of its own and on weights that are its parameters by another name.

    The other name keeps hooks on the parameters' gradients, such as DeepSpeed's, and their streams out of a capture.
    """

    def __init__(
        self, stage: nn.Module, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._stage = stage
        self._weights: dict[str, Tensor] = {n: nn.Parameter(p.detach()) for n, p in stage.named_parameters()}
        self._x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        self._condition = torch.zeros(shape[0], shape[3], dtype=dtype, device=device, requires_grad=True)
        self._d_out = torch.zeros_like(self._x, requires_grad=False)
        self._out: Tensor | None = None
        self._gradients: tuple[Tensor, ...] = ()

    def forward(self) -> None:
        with torch.enable_grad():
            self._out = functional_call(self._stage, self._weights, (self._x, self._condition))

    def backward(self) -> None:
        assert self._out is not None
        inputs = [self._x, self._condition, *self._weights.values()]
        self._gradients = torch.autograd.grad(self._out, inputs, self._d_out)

    def forget(self) -> None:
        self._out, self._gradients = None, ()

    def captured(self, forward: torch.cuda.CUDAGraph, backward: torch.cuda.CUDAGraph, lend: bool) -> Captured:
        assert self._out is not None
        x, condition, out = self._x.detach(), self._condition.detach(), self._out.detach()
        return Captured(forward, backward, x, condition, out, self._d_out, self._gradients, lend)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: Captured, x: Tensor, condition: Tensor, *weights: Tensor) -> Tensor:
        captured.replays += 1
        ctx.captured, ctx.replay = captured, captured.replays
        captured.x.copy_(x)
        captured.condition.copy_(condition)
        captured.forward.replay()
        return captured.out.detach()

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        captured: Captured = ctx.captured
        if ctx.replay != captured.replays:
            raise RuntimeError(
                "a backward pass came after another forward pass of the same stage, which has overwritten what it "
                "needs: take gradients before the next forward pass, or set train.cuda_graphs false"
            )
        captured.d_out.copy_(d_outs[0])
        captured.backward.replay()
        return None, *_handed_out(captured)


def _handed_out(captured: Captured) -> Iterator[Tensor]:
    """The gradients. A weight's, given as a tensor of its own, becomes `.grad` where it lies; x's and condition's are
    used up by the backward passes that follow."""
    x, condition, *weights = captured.gradients
    yield from (x, condition)
    yield from (weight.detach() if captured.lend else weight.clone() for weight in weights)
