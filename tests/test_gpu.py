"""The main job's parts on a GPU: the same draws, the same network, training and sampling through the doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dico_ray.config import Config
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.models import create_model
from dico_ray.settings import build

pytestmark = pytest.mark.gpu


def _config(latents: Path, storage: Path, name: str, **settings: Any) -> Config:
    return build({
        "run": {"storage": str(storage), "name": name},
        "model": {"hidden_size": 32, "depths": [1] * 5, "num_classes": 10, "latent_size": 8},
        "data": {"latents": str(latents), "window_samples": 64, "read_tasks": 1},
        "train": {"global_batch": 32, "steps": 8, "lr": 1e-3, "log_every": 1, "checkpoint_every": 4, **settings},
        "resources": {"accelerator": "gpu"},
    })  # fmt: skip


def test_draws_are_those_of_the_cpu() -> None:
    rows = torch.arange(1000, 1064)
    for step in (0, 2**33 + 5):
        on_gpu = integers(7, Stream.TIMESTEP, step, rows.cuda(), 1000)
        assert torch.equal(on_gpu.cpu(), integers(7, Stream.TIMESTEP, step, rows, 1000))
        noise = normal(7, Stream.NOISE, step, rows.cuda(), (4, 8, 8)).cpu()
        torch.testing.assert_close(noise, normal(7, Stream.NOISE, step, rows, (4, 8, 8)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
def test_the_network_gives_what_the_cpu_gives_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", num_classes=10).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x, t, y = torch.randn(6, 4, 16, 16).double(), torch.arange(6) * 150, torch.arange(6)
    expected = model(x, t, y)
    found = model.to("cuda", dtype)(x.to("cuda", dtype), t.cuda(), y.cuda()).double().cpu()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.usefixtures("gpu_ray")
@pytest.mark.parametrize(("precision", "stages", "tolerance"), [("fp32", (0, 1), 1e-3), ("bf16", (1, 2, 3), 1e-2)])
def test_training_agrees_between_stages_and_through_a_resume(
    latents: Path, tmp_path: Path, precision: str, stages: tuple[int, ...], tolerance: float
) -> None:
    """The last stage is stopped after four steps, and goes on by the same command."""
    from dico_ray import train
    from dico_ray.storage import Storage
    from dico_ray.training.telemetry import read_metrics

    curves = {}
    for stage in stages:
        for steps in (4, 8) if stage == stages[-1] else (8,):
            config = _config(latents, tmp_path, f"zero{stage}", zero_stage=stage, precision=precision, steps=steps)
            train.main(config)
        curves[stage] = np.array([m["loss"] for m in read_metrics(Storage(config.run.folder))])
        assert len(curves[stage]) == 8
        np.testing.assert_allclose(curves[stage], curves[stages[0]], rtol=tolerance)


@pytest.fixture(scope="module")
def gpu_ray() -> Any:
    """A Ray of this test module's own, with the machine's GPUs."""
    import ray

    from dico_ray import cluster

    cluster.quiet()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
