"""Named runs, a row each: the published recipes of DiCo (arXiv 2505.11196, Table 7), and one for a laptop."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from dico_ray.config import Config, ConfigError
from dico_ray.settings import build, merge, read_yaml

_DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"


def _row(
    model: str, image_size: int, global_batch: int, lr: float, warmup: int,
    betas: tuple[float, float], steps: int, workers: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": {"name": model, "latent_size": image_size // 8},
        "encode": {"image_size": image_size},
        "train": {
            "global_batch": global_batch, "lr": lr, "warmup_steps": warmup, "betas": betas,
            "steps": steps, "num_workers": workers,
        },
    }  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    #                  model    image batch    lr  warmup        betas      steps  workers (GPUs in the paper)
    "dico-s-256":  _row("DiCo-S",  256,  256, 1e-4,    0, (0.9, 0.999),   400_000,  8),
    "dico-b-256":  _row("DiCo-B",  256,  256, 1e-4,    0, (0.9, 0.999),   400_000,  8),
    "dico-l-256":  _row("DiCo-L",  256,  256, 1e-4,    0, (0.9, 0.999),   400_000, 16),
    "dico-xl-256": _row("DiCo-XL", 256,  256, 1e-4,    0, (0.9, 0.999), 3_750_000, 32),
    "dico-h-256":  _row("DiCo-H",  256, 1024, 2e-4, 5000, (0.99, 0.99), 1_000_000, 64),
    "dico-xl-512": _row("DiCo-XL", 512,  256, 1e-4,    0, (0.9, 0.999), 3_000_000, 64),
    # Handwritten digits on two CPU cores in minutes: 32-pixel images, 4x8x8 latents.
    "tiny-cpu": {
        "model": {"name": "DiCo-tiny", "num_classes": 10, "latent_size": 8},
        "codec": {"vae": str(_DEMO_WEIGHTS / "vae")},
        "data": {"window_samples": 2560, "read_tasks": 1},
        "encode": {"image_size": 32, "batch_size": 100, "shard_samples": 500, "chunk_bytes": 131_072},
        "train": {
            "global_batch": 96, "lr": 2e-3, "warmup_steps": 50, "steps": 1200, "num_workers": 2,
            "flip": False, "ema_decay": 0.995, "precision": "fp32", "zero_stage": 2, "grad_clip": 1.0,
            "checkpoint_every": 600, "log_every": 10,
        },
        "sample": {"count": 1000, "steps": 50, "guidance_scale": 1.5, "guidance_channels": "all", "batch_size": 100},
        "evaluate": {
            "features": str(_DEMO_WEIGHTS / "digits_features.safetensors"),
            "judge": str(_DEMO_WEIGHTS / "digits_judge.safetensors"),
        },
        "resources": {"actors": 2, "worker_cpus": 0.5, "actor_cpus": 0.5, "threads": 1},
    },
}  # fmt: skip


def resolve(recipe: str | None, config_file: str | None, overrides: dict[str, Any]) -> Config:
    """Defaults, then the recipe, then the YAML file, then the command line -> Config.

    The recipe may be named on the command line or by `recipe:` in the file; the command line wins.
    Raises ConfigError (one line) for whatever cannot work.
    """
    from_file = read_yaml(config_file) if config_file else {}
    name = recipe or from_file.get("recipe") or ""
    if not isinstance(name, str):
        raise ConfigError(f"recipe: {name!r} must be a name; take one of {', '.join(RECIPES)}")
    if name and name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"take one of {', '.join(RECIPES)}"
        raise ConfigError(f"recipe {name!r} is unknown; {hint}")
    settings = merge(merge(RECIPES.get(name, {}), from_file), overrides)
    return build(merge(settings, {"recipe": name}))
