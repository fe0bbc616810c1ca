"""One rank of `torchrun`: follows the 20 recorded training steps of golden/training.npz with the engine.

    torchrun --nproc-per-node N follow_golden.py OUTPUT '[{"zero_stage": 0, "precision": "fp32", ...}, ...]' [--gpu]

A case's bucket_elements stands in for the engine's; before the step bad_before, one is tried that has NaN among the
last rank's latents, and before bad_sum_before one in which a single sum, of the last rank's, is infinite. Writes, for
each of the settings, the relative L2 errors of losses, gradient norms, weights and EMA.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dico_ray.config.train import BUCKET_ELEMENTS
from dico_ray.diffusion.process import Diffusion
from dico_ray.models import DiCo
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training import engine as engines
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training.saving import save

GOLDEN = Path(__file__).parents[1] / "golden"
TINY, TRAINING = np.load(GOLDEN / "model_tiny.npz"), np.load(GOLDEN / "training.npz")
BATCH, STEPS = 8, 20
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "--gpu" in sys.argv else torch.device("cpu")


def make(settings: dict[str, Any]) -> tuple[Engine, EMA]:
    model = DiCo(
        int(TINY["hidden_size"]), tuple(TINY["depths"].tolist()), int(TINY["ffn_ratio"]), int(TINY["num_classes"]),
        class_dropout_prob=0.0,
    )  # fmt: skip
    model.load_state_dict({name[2:]: torch.from_numpy(TINY[name]) for name in TINY.files if name.startswith("w:")})
    train = build({
        "train": {
            "global_batch": BATCH, "num_workers": dist.get_world_size(), "lr": float(TRAINING["lr"]),
            "betas": TRAINING["betas"].tolist(), **settings,
        }
    }).train  # fmt: skip
    engine = Engine(model, train, DEVICE)
    return engine, EMA(engine, float(TRAINING["ema_decay"]))


def take_step(engine: Engine, step: int, spoilt: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    share, size = BATCH // engine.world_size, engine.micro_batch
    total, norm = torch.zeros((), device=DEVICE), None
    for at in range(engine.rank * share, (engine.rank + 1) * share, size):
        rows = slice(at, at + size)
        x0, noise = (torch.from_numpy(TRAINING[k][step][rows]).float().to(DEVICE) for k in ("x0", "noise"))
        t, y = (torch.from_numpy(TRAINING[k][step][rows]).to(DEVICE) for k in ("t", "y"))
        if spoilt and engine.rank == engine.world_size - 1:
            x0[0, 0, 0, 0] = float("nan")
        loss = Diffusion().training_losses(engine, x0, t, noise, y=y)["loss"].mean()
        norm = engine.backward(loss)
        total += loss.detach() * size / share
    assert norm is not None
    return total, norm


def spoil_a_sum(engine: Engine) -> None:
    """Of the last rank's, at stage 2, once they are complete."""
    if engine.rank == engine.world_size - 1:
        engine._deepspeed.optimizer.averaged_gradients[0].flat_partition[1] = float("inf")


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def follow(settings: dict[str, Any], folder: Storage) -> dict[str, float]:
    """Half the steps, a checkpoint into a fresh engine, and the other half."""
    engines.BUCKET_ELEMENTS = settings.pop("bucket_elements", BUCKET_ELEMENTS)
    bad_before, bad_sum = settings.pop("bad_before", None), settings.pop("bad_sum_before", None)
    engine, ema = make(settings)
    losses, norms = [], []
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = save(folder, step, engine, ema, {})
            engine.close()
            engine, ema = make(settings)
            checkpoints.restore(saved, engine, ema)
        if step == bad_before:
            _, norm = take_step(engine, step, spoilt=True)
            assert engine.skipped_last, f"taken, with a gradient norm of {norm}"
            assert not norm.isfinite()
        if step == bad_sum:  # at stage 2, in one owner's part alone
            engine.before_step.append(partial(spoil_a_sum, engine))
            take_step(engine, step)
            engine.before_step.pop()
            assert engine.skipped_last
        loss, norm = take_step(engine, step)
        ema.update(step + 1)
        losses.append(engine.mean(loss[None])[0])
        norms.append(float(norm))
    saved = save(folder, STEPS, engine, ema, {})
    engine.close()
    errors = {"loss": error(losses, TRAINING["losses"]), "grad_norm": error(norms, TRAINING["gradient_norms"])}
    for kind, prefix in (("weight", "w:"), ("ema", "ema:")):
        tensors = saved.tensors(kind)
        names = [n for n in TRAINING.files if n.startswith(prefix)]
        errors[kind] = max(error(tensors[n[len(prefix) :]].numpy(), TRAINING[n]) for n in names)
        all_norms = np.array([float(tensors[str(n)].norm()) for n in TRAINING["names"]])
        errors[f"{kind}_norms"] = error(all_norms, TRAINING["weight_norms" if kind == "weight" else "ema_norms"])
    return errors


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
        torch.backends.cudnn.allow_tf32 = False  # whose 10 bits move gradient norms by 1e-4
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    output = Storage(sys.argv[1])
    cases = json.loads(sys.argv[2])
    results = [follow(settings, output.at(f"case-{i}")) for i, settings in enumerate(cases)]
    if dist.get_rank() == 0:
        output.write("errors.json", json.dumps(results).encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
