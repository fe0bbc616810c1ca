"""The loss on held-out latents: the same at every ZeRO stage and world size, and training goes on as without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dico_ray.config import ConfigError
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.diffusion.process import Diffusion
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint
from dico_ray.training.validation import check_held_out, held_out_keys
from tests.conftest import write_latents
from tests.training import oracle

_ROOT, _STEPS = Path(__file__).parents[2], 10


def _follow(workers: int, cases: list[dict[str, Any]], held_out: Path, folder: Path) -> list[dict[str, Any]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
        "-m", "tests.training.follow_validation", str(folder), str(held_out), json.dumps(cases),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "curves.json").read_text())


def _directly(checkpoint: Checkpoint, held_out: Path) -> float:
    """The loss of a checkpoint's averages over 50 of 200 samples, by a plain network and all at once."""
    network = oracle.initial_model(oracle.settings({}))
    network.load_state_dict(checkpoint.tensors("ema"))
    storage = Storage(str(held_out))
    manifest = Manifest.load(storage)
    samples = read_chunks(storage, manifest, range(len(manifest.chunks)))
    keys = torch.arange(0, 200, 4)
    t = integers(0, Stream.VALIDATION_TIMESTEP, 0, keys, 1000)
    noise = normal(0, Stream.VALIDATION_NOISE, 0, keys, (4, 8, 8))
    x0, labels = torch.tensor(samples.latents[keys, 0]).float(), torch.tensor(samples.labels[keys])
    with torch.no_grad():
        return float(Diffusion().training_losses(network, x0, t, noise, y=labels)["loss"].mean())


# (ZeRO stage, offload, precision) on so many workers
_CASES = {
    1: [(1, False, "fp32"), (3, False, "bf16")],
    2: [(0, False, "fp32"), (1, False, "bf16"), (2, True, "fp32"), (3, False, "fp32")],
}


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_the_averages_loss_is_right_and_training_does_not_notice(workers: int, latents: Path, tmp_path: Path) -> None:
    base = {"steps": _STEPS, "warmup_steps": 2, "micro_batch": 4}
    cases = [
        {**base, "zero_stage": stage, "offload": offload, "precision": precision}
        for stage, offload, precision in _CASES[workers]
    ]
    for i, (case, found) in enumerate(zip(cases, _follow(workers, cases, latents, tmp_path), strict=True)):
        assert found["with"] == found["without"], case
        assert list(found["validated"]) == ["4", "8", "10"]
        last = found["validated"]["10"]
        assert last["validation_samples"] == 50
        assert last["val_loss"] == pytest.approx(last["val_mse"] + last["val_vb"], rel=1e-6)
        checkpoint = Checkpoint.last(Storage(str(tmp_path / f"case-{i}")))
        assert checkpoint is not None
        rounding = 1e-6 if case["precision"] == "fp32" else 1e-2
        assert last["val_loss"] == pytest.approx(_directly(checkpoint, latents), rel=rounding), case


def test_samples_are_spread_over_the_held_out_set() -> None:
    assert held_out_keys(10, 4).tolist() == [0, 2, 5, 7]
    assert held_out_keys(3, 2048).tolist() == [0, 1, 2]
    assert len(np.unique(held_out_keys(50_000, 2048))) == 2048


def test_held_out_latents_are_needed_and_have_to_be_alike(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.validate_every: 5 needs .* data\.validation"):
        build({"train": {"validate_every": 5}})
    config = build({"train": {"validate_every": 5}, "data": {"validation": str(tmp_path / "other")}})
    manifest = Manifest.load(Storage(str(latents)))
    with pytest.raises(ConfigError, match=r"^data\.validation: .*other has no manifest"):
        check_held_out(config, manifest)
    other = json.loads((latents / "manifest.json").read_text())
    write_latents(tmp_path / "other")
    check_held_out(config, manifest)
    other["classes"][3] = "cat"
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"^data\.validation: the classes of .*other: 0, 1, 2, cat"):
        check_held_out(config, manifest)
