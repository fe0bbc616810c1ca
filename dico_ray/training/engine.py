"""The training engine: DeepSpeed ZeRO behind five verbs, and the only home of deepspeed.

Whatever the ZeRO stage, a rank sees its own part of the training state as *fragments*: flat ranges of named
parameters with fp32 master weights and AdamW moments. EMA and checkpoints are built on them alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dico_ray.config import Train
from dico_ray.config.train import BUCKET_ELEMENTS
from dico_ray.training.partition import PartitionedGradients

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
_READERS = 8  # of a checkpoint, at a time


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter, as views of this rank's fp32 state (all 1-D).

    owned: this rank keeps their EMA and writes them to checkpoints (at stage 0 every rank holds everything,
    and the parameters are dealt out).
    """

    name: str
    start: int
    stop: int
    owned: bool
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class _Place:
    """Where a fragment lives: `length` elements of the optimizer's tensor `flat`, from `offset`."""

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int
    owned: bool = True


class _AdamW(torch.optim.AdamW):
    """AdamW that leaves a step out when told to: DeepSpeed looks for itself, but not at stage 0 in fp32."""

    skip = False

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if self.skip else super().step(closure)


def _by_rate(model: nn.Module, rates: Mapping[str, float]) -> dict[float, list[str]]:
    """The parameters' names by the factor of their learning rate: AdamW's groups."""
    groups: dict[float, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(rates.get(name, 1.0), []).append(name)
    return groups


class Engine:
    """AdamW on a model whose state is sharded by ZeRO over the torch.distributed default group.

    Master weights, moments and accumulated gradients are fp32 (at stage 0 in bf16 DeepSpeed accumulates in
    bf16); `train.precision` is the network's arithmetic. A step whose gradients are not finite is left out.

    Per optimizer step the host waits for the device where DeepSpeed looks whether the gradient norm is finite (once,
    and where it clips, for each group of parameters; at stage 3 also for each micro-batch's reduction); ours adds one
    wait at stage 0 in fp32, and none elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Train,
        device: torch.device,
        rates: Mapping[str, float] | None = None,
        units: Sequence[type[nn.Module]] = (),
    ) -> None:
        """model: fp32 weights, the same on every rank. Takes the model over: it is moved and may be sharded.

        rates: by parameter name, what its learning rate is multiplied by, 1 where none is given; weight decay takes
        the same part of each weight all the same. units: types of modules whose weights stage 3 gathers when the
        module is called, all at once; elsewhere it gathers a layer's when the layer is.
        Every step takes config.global_batch samples, in micro-batches of config.micro_batch_on(world size).
        """
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        # DeepSpeed would compile a shared-memory all-reduce for CPU workers: a minute, and a C++ compiler, for nothing.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._stage, self._config = config.zero_stage, config
        self.before_step: list[Callable[[], None]] = []
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        self.micro_batch = config.micro_batch_on(self.world_size)
        self._skipped_last = False
        self._skips = 0
        self._agreement: tuple[Any, Tensor] | None = None
        self._talk: Any = dist.new_group(backend="gloo") if self.world_size > 1 else None
        initial = {name: p.detach().reshape(-1).clone() for name, p in model.named_parameters()}
        self._groups = _by_rate(model, rates or {})
        optimizer = _AdamW(
            [{"params": [model.get_parameter(name) for name in names], "weight_decay": config.weight_decay / rate}
             for rate, names in self._groups.items()],
            config.lr, config.betas, fused=device.type == "cuda",
        )  # fmt: skip
        self._adam: Any = optimizer
        self.set_lr(config.lr)
        parameters = sum(p.numel() for p in model.parameters())
        if self._stage == 3 and units:
            set_z3_leaf_modules(model, list(units))
        self._deepspeed: Any = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=self._settings(parameters)
        )[0]
        if self._adds_at_once:
            _add_without_a_copy(self._deepspeed.optimizer)
        if self._stage == 2 and not config.offload:
            PartitionedGradients(self._deepspeed.optimizer, BUCKET_ELEMENTS, deepspeed.comm.reduce)
        self._places = list(self._locate())
        # DeepSpeed takes its masters from weights already rounded to bf16: give them the exact ones.
        self.restore(0, lambda kind, name, start, stop: initial[name][start:stop] if kind == "weight" else None)

    def _settings(self, parameters: int) -> dict[str, Any]:
        """DeepSpeed's. What is not plain:

        its throughput timer waits for the device twice a micro-batch; gradients accumulated in fp32 would be rounded
        to bf16 for their reduction; bf16 gradients join the fp32 sum, and are freed, as soon as they are there.
        """
        bf16, gpu = self._config.precision == "bf16", self.device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self._stage,
            "overlap_comm": gpu and self._stage >= 2 and self.world_size > 1,
            "reduce_bucket_size": min(parameters, BUCKET_ELEMENTS),
        }
        if self._config.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        return {
            "train_batch_size": self._config.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_clipping": self._config.grad_clip,
            "bf16": {"enabled": bf16, "immediate_grad_update": self._adds_at_once},
            "data_types": {"grad_accum_dtype": "bf16" if bf16 and self._stage == 0 else "fp32"},
            "communication_data_type": "bf16" if bf16 and self._stage == 0 else "fp32",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},
            "steps_per_print": 2**62,
        }

    @property
    def frees_gradients(self) -> bool:
        """Whether a micro-batch's gradients join an fp32 sum, and are let go, as soon as they are there."""
        return self._adds_at_once or (self._stage == 2 and not self._config.offload)

    @property
    def _adds_at_once(self) -> bool:
        return self._config.precision == "bf16" and self._stage == 1 and not self._config.offload

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The network's forward pass; inputs and outputs are the model's own."""
        return self._deepspeed(*inputs, **named)

    def backward(self, loss: Tensor) -> Tensor | None:
        """One micro-batch's mean loss -> gradients; the global batch's last one also takes the optimizer step.

        Returns the gradient norm before clipping after that last one, None after the others.
        """
        engine = self._deepspeed
        with self.phase("backward"):
            engine.backward(loss)
        with self.phase("optimizer"):
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
                return None
            for call in self.before_step:
                call()
            return self._step()

    def _step(self) -> Tensor:
        engine, norm = self._deepspeed, None
        before = engine.skipped_steps
        if self._adam is engine.optimizer:
            norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()])
            self._adam.skip = not bool(torch.isfinite(norm))
        engine.step()
        self._skipped_last = self._adam.skip or engine.skipped_steps > before
        self._skips += self._skipped_last
        if self._skipped_last and self._config.offload and hasattr(engine.optimizer, "averaged_gradients"):
            # DeepSpeed 0.19 leaves the bad sum in place when it accumulates for an offloaded optimizer.
            for group in engine.optimizer.averaged_gradients:
                engine.optimizer.averaged_gradients[group] = None
        found = engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(found, dtype=torch.float32, device=self.device)

    @property
    def skipped_last(self) -> bool:
        """Whether the last optimizer step was left out, on every rank alike, because gradients were not finite."""
        return self._skipped_last

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out so far."""
        return self._skips

    def agree(self, wanted: bool) -> bool:
        """Whether any rank wanted it at the call before: the same answer on every rank, without waiting for a device.

        Every rank calls it at the same steps.
        """
        if self._talk is None:
            return wanted
        answer = False
        if self._agreement:
            work, flag = self._agreement
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(wanted))
        self._agreement = dist.all_reduce(flag, dist.ReduceOp.MAX, self._talk, async_op=True), flag
        return answer

    def set_lr(self, lr: float) -> None:
        """lr: of parameters whose rate is 1."""
        for group, rate in zip(self._adam.param_groups, self._groups, strict=True):
            group["lr"] = lr * rate

    def mean(self, values: Tensor) -> list[float]:
        """(N,) numbers averaged over the ranks; waits for the device."""
        total = values.detach().double()
        dist.all_reduce(total)
        return (total / self.world_size).tolist()

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        if self._talk is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, self._talk)
        return items

    def fragments(self) -> list[Fragment]:
        """This rank's training state. The tensors are views: what they show changes with every step."""
        return [
            Fragment(p.name, p.start, p.start + p.length, p.owned, *(self._view(p, kind) for kind in KINDS))
            for p in self._places
        ]

    def _view(self, place: _Place, kind: str) -> Tensor:
        tensor = place.flat.detach() if kind == "weight" else self._adam.state[place.flat][kind]
        return tensor.reshape(-1).narrow(0, place.offset, place.length)

    def restore(self, step: int, read: Callable[[str, str, int, int], Tensor | None]) -> None:
        """Sets this rank's state as after `step` steps.

        read(kind, name, start, stop) gives fp32 elements of a flattened parameter, kind one of KINDS, or None
        for zeros (moments before the first step).
        """
        for flat in {id(p.flat): p.flat for p in self._places}.values():
            where = flat.device if self.device.type == "cuda" else "cpu"
            known = self._adam.state.get(
                flat, {}
            )  # used again: beside the old moments there may be no room for new ones
            state = {
                kind: known[kind].zero_() if kind in known else torch.zeros_like(flat, requires_grad=False)
                for kind in MOMENTS
            }
            self._adam.state[flat] = {"step": torch.tensor(float(step), device=where), **state}

        def fill(part: tuple[_Place, str]) -> None:
            place, kind = part
            value = read(kind, place.name, place.start, place.start + place.length)
            if value is not None:
                self._view(place, kind).copy_(value)

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(fill, [(place, kind) for place in self._places for kind in KINDS]))
        self._publish()

    @contextmanager
    def averaged(self, averages: Sequence[Tensor]) -> Iterator[None]:
        """While the body runs, the network computes with other weights; training is not touched.

        averages: fp32, in the order of the owned fragments. They and the master weights change places meanwhile,
        which takes no memory. Every rank calls it, and takes no gradients in the body.
        """
        for call in self.before_step:  # a checkpoint may still be copying the weights
            call()
        self._exchange(averages)
        # At stage 3 DeepSpeed expects a backward pass unless told otherwise. Elsewhere the mode stays that of training:
        # in another one, compiled blocks would be compiled a second time.
        self._deepspeed.train(self._stage < 3)
        try:
            with torch.set_grad_enabled(self._stage < 3):
                yield
        finally:
            self._deepspeed.train()
            self._exchange(averages)

    @torch.no_grad()
    def _exchange(self, averages: Sequence[Tensor]) -> None:
        """Swaps the owned fragments' master weights with `averages`, and hands the network what they are now."""
        for place, average in zip((p for p in self._places if p.owned), averages, strict=True):
            weight = self._view(place, "weight")
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        if self._stage == 0 and self.world_size > 1:  # every rank holds all weights, but not all averages
            for index, place in enumerate(self._places):
                dist.broadcast(self._view(place, "weight"), index % self.world_size)
        self._publish()

    def _publish(self) -> None:
        """Master weights -> the weights that the network computes with, on every rank."""
        optimizer = self._deepspeed.optimizer
        if self._stage == 3:
            for low, high in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                low.data.copy_(high.data)
            if optimizer.persistent_parameters:  # small ones are kept whole on every rank
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage > 0:
            optimizer.update_lp_params()
            if hasattr(optimizer, "_hp_optimizer_states_linked"):
                optimizer._hp_optimizer_states_linked = False
        elif optimizer is not self._adam:
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for low, high in zip(lows, highs, strict=True):
                    low.data.copy_(high.data)

    def _locate(self) -> Iterator[_Place]:
        """Finds this rank's part of every parameter in DeepSpeed's structures, which differ by stage."""
        optimizer = self._deepspeed.optimizer
        group_of = {name: (g, i) for g, names in enumerate(self._groups.values()) for i, name in enumerate(names)}
        for index, (name, parameter) in enumerate(self._deepspeed.module.named_parameters()):
            owned = index % self.world_size == self.rank
            if self._stage == 3:
                group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = self.rank * length  # equal parts, the last ones padded
                length = max(0, min(length, parameter.ds_numel - start))
                if length:
                    yield _Place(name, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)
            elif self._stage > 0:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: the parameter lies wholly in other ranks' parts
                    flat = self._adam.param_groups[group_of[name][0]]["params"][0]
                    at, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _Place(name, low.start, at.numel, flat, at.start)
            elif optimizer is self._adam:
                yield _Place(name, 0, parameter.numel(), parameter, 0, owned)
            else:
                group, place = group_of[name]
                yield _Place(name, 0, parameter.numel(), optimizer.fp32_groups[group][place], 0, owned)

    def close(self) -> None:
        self._deepspeed.destroy()


def _add_without_a_copy(optimizer: Any) -> None:
    """Has DeepSpeed's BF16_Optimizer add bf16 gradients to their fp32 sums in one pass.

    DeepSpeed 0.19 makes an fp32 copy of each first: 6 ms of a micro-batch of 230, with DiCo-H on an H100.
    """
    assert callable(getattr(optimizer, "_update_hp_grad", None)), "DeepSpeed adds gradients elsewhere now"

    @torch.no_grad()
    def update(low: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if low.grad is None:
            return
        high = optimizer.fp32_groups_gradients[group][index]
        high.add_(low.grad.view(high.shape))
        low._hp_grad = high  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            low.grad.zero_()

    optimizer._update_hp_grad = update
