"""`dico-ray plan`: what a run needs, before anything starts. Needs neither torch nor a cluster."""

from __future__ import annotations

from dico_ray.arithmetic import forward_macs, parameter_count, training_flops
from dico_ray.config import Config
from dico_ray.planning.memory import state_memory


def shard_bytes(config: Config, samples: int) -> int:
    """Bytes of `samples` samples in latent shards (both flips, tar headers included)."""
    from dico_ray.data.shards import sample_bytes

    side = config.model.latent_size
    return samples * sample_bytes(config.model.in_channels, side, side)


def main(config: Config, *, verbose: bool = False) -> None:
    """`dico-ray plan`: prints parameters, arithmetic, memory by ZeRO stage, and bytes of shards and checkpoints."""
    model, train = config.model, config.train
    count = parameter_count(model)
    averages = 1 + len(train.ema_profiles)
    a = model.architecture
    print(f"model        {model.name}: width {a.hidden_size}, depths {list(a.depths)}, FFN ratio {a.ffn_ratio}")
    print(f"parameters   {count:,}")
    workers = train.world_sizes[0]
    micro = train.micro_batch_on(workers)
    print(
        f"arithmetic   {forward_macs(model) / 1e9:.2f} GMACs an image forward, "
        f"{training_flops(model) * train.global_batch / 1e12:,.2f} TFLOP a training step (6 x MACs x images)"
    )
    print(
        f"step         {train.global_batch} images: {workers} workers x {micro} x "
        f"{train.global_batch // workers // micro} (workers x micro-batch x accumulation)"
    )
    print(f"run          {train.steps:,} steps, {train.steps * train.global_batch:,} images")
    print(f"\nGB per worker, {train.precision}, {workers} workers (activations come on top)")
    print("  ZeRO   weights  gradients  optimizer     EMA    total")
    for stage in range(4):
        m = state_memory(count, stage, workers, train.precision, averages)
        mark = "  <- train.zero_stage" if stage == train.zero_stage else ""
        values = (m.weights, m.gradients, m.optimizer, m.ema, m.total)
        print(
            f"  {stage}    "
            + "".join(f"{v / 1e9:{w}.2f}" for v, w in zip(values, (9, 11, 11, 8, 9), strict=True))
            + mark
        )
    print(
        f"\nshards       {shard_bytes(config, 1):,} bytes a sample, "
        f"{shard_bytes(config, 1_281_167) / 1e9:.1f} GB for ImageNet's 1,281,167 images"
    )
    kept = "EMA" if averages == 1 else f"{averages} averages"
    print(
        f"checkpoint   {count * 4 * (3 + averages) / 1e9:.2f} GB (weights, two moments, {kept}; fp32), "
        f"{train.keep_checkpoints} kept"
    )
    if train.ema_snapshot_every:
        snapshots = -(-train.steps // train.ema_snapshot_every)
        size = count * 4 * len(train.ema_profiles) / 1e9
        print(f"snapshots    {snapshots} of {size:.2f} GB (averages for `dico-ray ema`), all kept")
