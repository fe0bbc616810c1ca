"""`dico-ray data info`: what a set of latent shards is, from its manifest alone."""

from __future__ import annotations

from dico_ray.config import Config
from dico_ray.data.shards import Manifest
from dico_ray.storage import Storage


def main(config: Config, *, verbose: bool, url: str) -> None:
    """Prints the manifest's facts. Raises ConfigError where there is none, ShardError for a damaged one."""
    manifest = Manifest.load(Storage(url))
    size = sum(shard.bytes for shard in manifest.shards)
    height, width = manifest.latent_size
    sample = f"{manifest.sample_bytes:,} bytes each" if manifest.layout == "strided" else "of varying size"
    flips = "plain and mirrored" if manifest.flips == 2 else "plain only"
    stored = "latents" if manifest.content == "latents" else "mean and log variance of the autoencoder's posterior"
    more = len(manifest.classes) > 5
    rows = {
        "samples": f"{manifest.count:,} {sample}, in {len(manifest.shards):,} shards of {size / 1e9:.2f} GB together",
        "latents": f"{manifest.latent_channels} x {height} x {width}, {flips}, of {manifest.image_size}-pixel images",
        "stored": stored,
        "classes": f"{len(manifest.classes):,}: {', '.join(manifest.classes[:5])}{', ...' if more else ''}",
        "chunks": f"{len(manifest.chunks):,} of up to {manifest.chunk_samples:,} samples",
        "codec": ", ".join(f"{name} {value}" for name, value in manifest.codec.items()),
        **{name: ", ".join(f"{v:.4f}" for v in values) for name, values in manifest.statistics.items()},
        "left out": f"{len(manifest.skipped):,} images" + "".join(f"\n  {reason}" for reason in manifest.skipped),
        "hash": manifest.hash,
    }
    print("\n".join(f"{name:10}{text}" for name, text in rows.items()))
