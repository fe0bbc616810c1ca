"""The main job's parts on a GPU: the same draws, the same network, training and sampling through the doors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray.config import Config
from dico_ray.diffusion.noise import Stream, integers, normal
from dico_ray.models import DiCo, create_model
from dico_ray.settings import build
from dico_ray.weight_files import arguments

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


@pytest.mark.usefixtures("gpu_ray")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_actors_on_halves_of_a_gpu_make_what_one_makes(tmp_path: Path, precision: str) -> None:
    from dico_ray import evaluate, sample
    from dico_ray.data.generated import image_set
    from dico_ray.demo import FEATURES, VAE
    from dico_ray.demo.digits import load_digits
    from dico_ray.storage import Storage
    from dico_ray.training.checkpoint import write_whole
    from dico_ray.weights import CHECKPOINTS

    def config(actors: int) -> Config:
        settings = _config(tmp_path, tmp_path / "runs", "random").model_dump()
        settings["codec"] |= {"vae": str(VAE), "precision": precision}
        settings["sample"] |= {
            "count": 20, "steps": 5, "batch_size": 4, "precision": precision, "output": str(tmp_path / str(actors))
        }  # fmt: skip
        settings["evaluate"] |= {
            "features": str(FEATURES), "reference": str(tmp_path / "real"), "range_size": 4,
            "images": str(tmp_path / "1" / "images"), "output": str(tmp_path / f"{actors}.json"), "precision": "fp16",
            "cache": str(tmp_path / f"cache-{actors}"),
        }  # fmt: skip
        settings["resources"] |= {"actors": actors, "actor_gpus": 1 / actors}
        return build(settings)

    one = config(1)
    torch.manual_seed(0)
    network = DiCo(**arguments(one.model))
    weights = {name: 0.2 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    classes = [str(label) for label in range(10)]
    about = {"config": one.model_dump(mode="json"), "codec": {"vae": "", "hash": ""}, "classes": classes}
    write_whole(Storage(one.run.folder).at(CHECKPOINTS), 1, {"ema": weights}, about)
    (tmp_path / "real").mkdir()
    for i, digit in enumerate(load_digits()[0][:20]):
        Image.fromarray(digit).save(tmp_path / "real" / f"{i}.png")
    images, numbers = [], []
    for actors in (1, 2):
        sample.main(config(actors))
        images.append(image_set("png", Storage(str(tmp_path / str(actors))), classes, 20).read(range(20)))
        evaluate.main(config(actors))
        numbers.append(json.loads((tmp_path / f"{actors}.json").read_text()))
    assert all(np.array_equal(images[0][i], images[1][i]) for i in range(20))
    for name in ("precision", "recall"):
        assert numbers[0][name] == numbers[1][name]
    assert numbers[0]["frechet_distance"] == pytest.approx(numbers[1]["frechet_distance"], rel=1e-6)
    assert numbers[0]["frechet_distance"] > 1
