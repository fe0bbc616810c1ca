"""`dico-ray plan`: what a run needs and how long it takes, before anything starts. Needs neither torch nor Ray."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path

from dico_ray.arithmetic import forward_macs, parameter_count, training_flops
from dico_ray.config import Config, ConfigError
from dico_ray.planning import memory, scaling, speed, traffic
from dico_ray.planning.memory import Fit, State
from dico_ray.planning.plot import check_file, draw
from dico_ray.planning.scaling import Point
from dico_ray.planning.traffic import Reading, Saving

IMAGENET = 1_281_167
_NOWHERE = "the run fits on no number of GPUs"


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage on the run's workers. image: bytes of each of a micro-batch's; largest: so many images fit.

    The same if every block were computed again in the backward pass. images_per_s: None where it is not known.
    """

    stage: int
    state: State
    image: int
    largest: int
    image_recomputed: int
    largest_recomputed: int
    images_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """All that is told of a run. step and hours are None where no speed was measured (`unknown` says why) or nothing
    fits; cost is None without hardware.price."""

    model: str
    parameters: int
    forward_macs: int
    training_flops: int
    workers: int
    fit: Fit
    stages: tuple[Stage, ...]
    unknown: str
    step: Point | None
    hours: float | None
    cost: float | None
    checkpoint: Saving
    reading: Reading | None
    ladder: tuple[Point, ...]
    grown: tuple[Point, ...]


def make(config: Config) -> Plan:
    """The plan of a run. Raises ConfigError where hardware.gpu is unknown."""
    train = config.train
    workers = train.world_sizes[0]
    step = scaling.step(config, workers)
    saving = traffic.checkpoint(config, workers)
    hours = None
    if step:
        hours = (train.steps * step.step_s + -(-train.steps // train.checkpoint_every) * saving.stall_s) / 3600
    price, model = config.hardware.price, config.model
    return Plan(
        model=model.name, parameters=parameter_count(model), forward_macs=forward_macs(model),
        training_flops=training_flops(model), workers=workers, fit=memory.fits(config),
        stages=tuple(_stage(config, stage, workers) for stage in range(4)), unknown=speed.why_unknown(config),
        step=step, hours=hours, cost=hours * workers * price if hours and price is not None else None,
        checkpoint=saving, reading=traffic.reading(config, step.images_per_s) if step else None,
        ladder=tuple(scaling.ladder(config)), grown=tuple(scaling.grown(config)),
    )  # fmt: skip


def _stage(config: Config, stage: int, workers: int) -> Stage:
    image, lean = (memory.image_bytes(config, stage, recompute) for recompute in (False, True))
    most, most_lean = (memory.largest_micro_batch(config, stage, workers, recompute) for recompute in (False, True))
    other = config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": stage})})
    step = scaling.step(other, workers)
    rate = step.images_per_s if step else None
    return Stage(stage, memory.config_state(config, stage, workers), image, most, lean, most_lean, rate)


def main(config: Config, *, verbose: bool = False, json: str = "", plot: str = "") -> None:
    """`dico-ray plan`: prints the plan. json, plot: files for its figures and for the scaling forecast's picture.

    Raises ConfigError, after all is told, if the run does not fit on hardware.gpu.
    """
    if plot:
        check_file(plot)
    plan = make(config)
    print("\n".join((*_run_lines(config, plan), "", *_memory_lines(config, plan), "", *_data_lines(config, plan))))
    print("\n" + "\n".join(_scaling_lines(config, plan)))
    if json:
        _write_json(json, plan)
    if plot:
        _draw(config, plan, plot)
    memory.check(config)


def _draw(config: Config, plan: Plan, file: str) -> None:
    if not plan.ladder or not plan.grown:
        raise ConfigError(f"--plot {file}: nothing to draw: {plan.unknown or _NOWHERE}")
    draw(config, list(plan.ladder), list(plan.grown), file)


def _write_json(file: str, plan: Plan) -> None:
    try:
        Path(file).write_text(jsonlib.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}; name a file in a folder that exists") from None


def _run_lines(config: Config, plan: Plan) -> list[str]:
    model, train, a = config.model, config.train, config.model.architecture
    workers, step = plan.workers, plan.step
    micro = step.micro_batch if step else train.micro_batch_on(workers)
    lines = [
        f"model        {model.name}: width {a.hidden_size}, depths {list(a.depths)}, FFN ratio {a.ffn_ratio}",
        f"parameters   {plan.parameters:,}",
        f"arithmetic   {plan.forward_macs / 1e9:.2f} GMACs an image forward, "
        f"{plan.training_flops * train.global_batch / 1e12:,.2f} TFLOP a training step (6 x MACs x images)",
        f"step         {train.global_batch} images: {workers} workers x {micro} x "
        f"{train.global_batch // workers // micro} (workers x micro-batch x accumulation)",
        f"run          {train.steps:,} steps, {train.steps * train.global_batch:,} images",
    ]
    if not step or plan.hours is None:
        return [*lines, f"time         not known: {plan.unknown or _NOWHERE}"]
    of_step = step.step_s / plan.hours
    cost = f", costs {plan.cost:,.0f}" if plan.cost is not None else ""
    return [
        *lines,
        f"time         {step.step_s:.3f} s a step: work {step.work_s:.3f}, launches {step.launches_s:.3f}, collectives "
        f"{step.communication_s:.3f} ({step.hidden_s:.3f} more are hidden), update {step.update_s:.3f}",
        f"rate         {step.images_per_s:,.0f} images/s, {step.images_per_s / workers:.0f} a GPU, MFU {step.mfu:.1%}",
        f"             {step.basis} from {step.row.told()}" + _spread(step),
        f"hours        {plan.hours:,.1f} ({step.least_s / of_step:,.1f} to {step.most_s / of_step:,.1f}) on {workers} "
        f"{config.hardware.gpu}: {plan.hours * workers:,.0f} GPU-hours{cost}",
    ]  # fmt: skip


def _spread(step: Point) -> str:
    if step.least_s == step.most_s:
        return ""
    return f"; by all rows {step.global_batch / step.most_s:,.0f} to {step.global_batch / step.least_s:,.0f} images/s"


def _memory_lines(config: Config, plan: Plan) -> list[str]:
    train, fit = config.train, plan.fit
    where = ", optimizer and EMA in the host's memory" if train.offload else ""
    lines = [
        f"GB a GPU, {train.precision}, {plan.workers} workers, "
        f"{config.hardware.gpu} with room for {fit.room_gb:.1f}{where}",
        "  ZeRO   weights  gradients  optimizer     EMA  buffers    state  + an image  fit  or recomputed  fit"
        "   images/s",
    ]  # fmt: skip
    for row in plan.stages:
        s = row.state
        parts = zip((s.weights, s.gradients, s.optimizer, s.ema, s.buffers, s.total), (9, 11, 11, 8, 9, 9), strict=True)
        rate = f"{row.images_per_s:,.0f}" if row.images_per_s else "-"
        lines.append(
            f"  {row.stage}    " + "".join(f"{part / 1e9:{width}.2f}" for part, width in parts)
            + f"{row.image / 1e9:12.3f}{row.largest:5}{row.image_recomputed / 1e9:15.3f}{row.largest_recomputed:5}"
            + f"{rate:>11}" + ("  <- train.zero_stage" if row.stage == train.zero_stage else "")
        )  # fmt: skip
    micro = max(1, fit.micro_batch)
    fits = f"largest micro-batch of a worker's {train.global_batch // plan.workers} images: {fit.micro_batch}"
    return [*lines, f"{fits} ({fit.memory_gb:.1f} GB at {micro})"]


def _data_lines(config: Config, plan: Plan) -> list[str]:
    train, saving = config.train, plan.checkpoint
    averages = 1 + len(train.ema_profiles)
    kept = "EMA" if averages == 1 else f"{averages} averages"
    gb, seconds = f"{saving.nbytes / 1e9:.2f} GB", f"{saving.least_s:.2g} to {saving.most_s:.2g} s"
    lines = [
        f"shards       {traffic.shard_bytes(config, 1):,} bytes a sample, "
        f"{traffic.shard_bytes(config, IMAGENET) / 1e9:.1f} GB for ImageNet's {IMAGENET:,} images",
        f"checkpoint   {gb} (weights, two moments, {kept}; fp32), {train.keep_checkpoints} kept",
        f"             {saving.part / 1e9:.2f} GB a worker, written {seconds} behind training,"
        f" which stands still {saving.stall_s:.2g} s (at the measured worker's rate)",
    ]
    if train.ema_snapshot_every:
        snapshots = -(-train.steps // train.ema_snapshot_every)
        size = plan.parameters * 4 * len(train.ema_profiles) / 1e9
        lines.append(f"snapshots    {snapshots} of {size:.2f} GB (averages for `dico-ray ema`), all kept")
    if plan.reading:
        r = plan.reading
        lines.append(
            f"reading      {r.requests:,.1f} requests/s, {r.nbytes / 1e6:,.1f} MB/s of shards; "
            f"{r.blocks / 1e6:,.1f} MB/s through Ray's object store, {r.held / 1e6:,.0f} MB held there"
        )
    return lines


def _scaling_lines(config: Config, plan: Plan) -> list[str]:
    if not plan.ladder:
        return [f"scaling      not known: {plan.unknown or _NOWHERE}"]
    grown = {point.workers: point for point in plan.grown}
    lines = [
        f"{config.hardware.gpu} GPUs, global batch {config.train.global_batch}, ZeRO-{config.train.zero_stage}"
        "; last: images/s if the batch grows with the GPUs",
        "  GPUs  micro-batch   step s   work  launches  collectives  update  images/s    MFU  binds              grown",
    ]
    for p in plan.ladder:
        shares = [part / p.step_s for part in (p.work_s, p.launches_s, p.communication_s, p.update_s)]
        told = "".join(f"{share:{width}.0%}" for share, width in zip(shares, (7, 10, 13, 8), strict=True))
        more = f"{grown[p.workers].images_per_s:,.0f}" if p.workers in grown else ""
        lines.append(
            f"{p.workers:6}{f'{p.micro_batch} x {p.accumulation}':>13}{p.step_s:9.3f}{told}{p.images_per_s:10,.0f}"
            f"{p.mfu:7.1%}  {p.binds:13}{more:>11}" + ("  <- this run" if p.workers == plan.workers else "")
        )
    last, why = scaling.limit(list(plan.ladder))
    return [*lines, f"more GPUs help up to {last.workers}: {why}"]
