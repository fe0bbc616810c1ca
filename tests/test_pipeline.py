"""The diffusers pipeline: it loads by both ways, and generates what our sampler generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from dico_ray import weights
from dico_ray.config import Config, ConfigError
from dico_ray.data.latents import Autoencoder
from dico_ray.diffusion import Diffusion, Guidance, Sampler
from dico_ray.models import create_model
from dico_ray.pipeline import DiCoPipeline, DiCoScheduler
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint

VAE = Path(__file__).parents[1] / "dico_ray" / "demo" / "weights" / "vae"
LABELS = [1, 7, 10]  # 10: no class


def config(folder: Path, method: str = "ddim", vae: str = str(VAE)) -> Config:
    settings = {"run": {"storage": str(folder), "name": "in"}, "codec": {"vae": vae}, "model": {"latent_size": 8}}
    return build(settings | {"sample": {"method": method}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an imported checkpoint."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=8, num_classes=10)
    save_file({name: torch.randn_like(t) * 0.2 for name, t in model.state_dict().items()}, root / "w.safetensors")
    weights.run_import(config(root), file=str(root / "w.safetensors"), step=3)
    return root


@pytest.fixture(scope="module")
def folder(run: Path) -> str:
    weights.run_export(config(run), to=str(run / "pipe"), format="diffusers", dtype="fp32")
    return str(run / "pipe")


@pytest.fixture
def pipe(folder: str) -> DiCoPipeline:
    loaded = weights.load_pipeline(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def ours(run: Path, method: Any, steps: int, guidance: Guidance, noise: Any = None) -> Tensor:
    """Latents of our own sampler, from the checkpoint."""
    settings = config(run, method)
    network = weights.load_network(weights.find_checkpoint(settings), settings)
    sampler = Sampler(Diffusion(), steps, method, guidance)
    return sampler.sample(network, start(), noise=noise, y=torch.tensor(LABELS))


def start() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def draws(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(3, 4, 8, 8, generator=generator)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("scale", "channels", "interval"), [(1.0, 3, None), (1.4, 3, None), (2.0, "all", None), (1.4, 3, (200, 700))]
)
def test_ddim_gives_our_samplers_latents(run: Path, pipe: DiCoPipeline, scale: float, channels: Any, interval: Any):
    expected = ours(run, "ddim", 10, Guidance(scale, 10, channels, interval))
    found = pipe(LABELS, scale, 10, channels, interval, latents=start(), output_type="latent").images
    assert relative(found, expected) < 1e-6


def test_ddpm_gives_our_samplers_latents(run: Path, pipe: DiCoPipeline) -> None:
    pipe.register_modules(scheduler=DiCoScheduler(method="ddpm"))
    expected = ours(run, "ddpm", 20, Guidance(1.4, 10), draws(9))
    generator = torch.Generator().manual_seed(9)
    found = pipe(LABELS, 1.4, 20, generator=generator, latents=start(), output_type="latent").images
    assert relative(found, expected) < 1e-6


def test_the_images_are_those_of_our_decoder(run: Path, pipe: DiCoPipeline) -> None:
    latents = ours(run, "ddim", 5, Guidance(1.0, 10))
    expected = Autoencoder(str(VAE), "fp32", torch.device("cpu")).decode(latents)
    found = {kind: pipe(LABELS, 1.0, 5, latents=start(), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert np.array_equal(np.stack([np.asarray(image) for image in found["pil"]]), expected.numpy())
    assert np.array_equal(found["np"], expected.numpy().astype(np.float32) / 255)
    assert torch.equal(found["pt"], expected.permute(0, 3, 1, 2) / 255)


def test_a_generator_repeats_the_images(pipe: DiCoPipeline) -> None:
    first, second, other = (
        pipe([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(seed), output_type="np").images
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    each = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    both = pipe([1, 2], num_inference_steps=3, generator=each, output_type="latent").images
    alone = pipe([2], num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="latent").images
    assert relative(alone[0], both[1]) < 1e-5


def test_diffusers_own_ddpm_agrees(run: Path, pipe: DiCoPipeline) -> None:
    """An independent check: their ancestral sampler with learned variance, from our scheduler's config."""
    pipe.register_modules(
        scheduler=DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")  # pyright: ignore
    )
    expected = ours(run, "ddpm", 50, Guidance(1.4, 10), draws(9))
    generator = torch.Generator().manual_seed(9)
    found = pipe(LABELS, 1.4, 50, generator=generator, latents=start(), output_type="latent").images
    assert relative(found, expected) < 1e-4  # its tables are cumulated in float32


def test_diffusers_own_ddim_agrees_where_its_spacing_is_ours() -> None:
    """With all 1000 steps: there its steps of equal length are ADM's."""
    theirs, mine = DDIMScheduler.from_config(DiCoScheduler(method="ddim").config), DiCoScheduler(method="ddim")  # pyright: ignore
    assert (theirs.config["clip_sample"], theirs.config["timestep_spacing"]) == (False, "linspace")  # pyright: ignore
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(1000)  # pyright: ignore
        x = start()
        for t in scheduler.timesteps:  # pyright: ignore
            noise = torch.tanh(0.9 * x + 0.1 * float(t) / 1000)
            x = scheduler.step(noise, t, x).prev_sample  # pyright: ignore
        results.append(x)
    assert relative(*results) < 1e-5


def test_another_of_diffusers_schedulers_can_take_its_place(pipe: DiCoPipeline) -> None:
    pipe.register_modules(scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))  # pyright: ignore
    assert pipe.scheduler.config["timestep_spacing"] == "linspace"
    latents = pipe(LABELS, 1.4, 10, latents=start(), output_type="latent").images
    assert torch.isfinite(latents).all()


_FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
generator = torch.Generator().manual_seed(5)
torch.save(pipe(class_labels=[1, 7, 10], guidance_scale=1.4, num_inference_steps=10, generator=generator,
                output_type="latent").images, out)
assert len(pipe([1], num_inference_steps=2).images) == 1
assert not {"ray", "deepspeed"} & set(sys.modules)
"""


@pytest.mark.long
def test_diffusers_own_loader_finds_it(run: Path, folder: str, tmp_path: Path) -> None:
    """In a fresh process that has imported nothing of ours."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / "latents.pt"
    command = [sys.executable, "-c", _FRESH, folder, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = ours(run, "ddim", 10, Guidance(1.4, 10))
    assert relative(torch.load(out), expected) < 1e-6


def test_the_folder_is_as_diffusers_lays_it_out(run: Path, folder: str) -> None:
    root = Path(folder)
    index = json.loads((root / "model_index.json").read_text())
    assert index["_class_name"] == "DiCoPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["classes"] == [str(i) for i in range(10)]
    stored, original = (
        load_file(p) for p in (root / "unet/diffusion_pytorch_model.safetensors", run / "w.safetensors")
    )
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    assert (json.loads((root / "unet/config.json").read_text())["sample_size"], len(list(root.rglob("*")))) == (8, 11)
    texts = [p.read_text() for p in root.rglob("*") if p.suffix in (".json", ".md", ".py")]
    assert not any(str(run) in text or str(VAE) in text for text in texts)  # no path of this machine
    assert "load_pipeline" in (root / "README.md").read_text()


def test_bf16_and_an_autoencoder_of_the_hub(run: Path, tmp_path: Path) -> None:
    settings = config(run, vae="stabilityai/sd-vae-ft-ema")
    weights.run_export(settings, to=str(tmp_path / "p"), format="diffusers", dtype="bf16")
    stored = load_file(tmp_path / "p/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert not (tmp_path / "p/vae").exists()
    pipe = weights.load_pipeline(str(tmp_path / "p"), torch.bfloat16)
    assert (pipe.unet.dtype, pipe.vae, pipe.config["vae_id"]) == (torch.bfloat16, None, "stabilityai/sd-vae-ft-ema")
    assert pipe([1], num_inference_steps=2, output_type="latent").images.dtype == torch.float32
    assert "`stabilityai/sd-vae-ft-ema`, from the hub" in (tmp_path / "p/README.md").read_text()


def test_a_second_export_replaces_the_first_and_nothing_else(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "p"
    weights.run_export(config(run), to=str(target), format="diffusers", dtype="fp32")
    weights.run_export(config(run, vae="a/hub-id"), to=str(target), format="diffusers", dtype="fp32")
    assert not (target / "vae").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are no pipeline"):
        weights.run_export(config(run), to=str(tmp_path / "other"), format="diffusers", dtype="fp32")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_another_autoencoder_than_the_trainings_is_refused(run: Path, tmp_path: Path) -> None:
    last = Checkpoint.last(Storage(str(run / "in" / "checkpoints")))
    assert last is not None
    marker = last.commit | {"about": last.about | {"codec": {"vae": "another", "hash": "0" * 32}}}
    Storage(str(tmp_path)).write("commit.json", json.dumps(marker).encode())
    for part in last.commit["parts"]:
        Storage(str(tmp_path)).write(part["file"], last.storage.read(part["file"]))
    settings = config(run)
    settings = settings.model_copy(update={"sample": settings.sample.model_copy(update={"checkpoint": str(tmp_path)})})
    with pytest.raises(ConfigError, match="is not the autoencoder of the training latents, which came from another"):
        weights.run_export(settings, to=str(tmp_path / "p"), format="diffusers", dtype="fp32")
    assert not (tmp_path / "p").exists()


def test_what_cannot_work_is_said(run: Path, folder: str, pipe: DiCoPipeline, tmp_path: Path) -> None:
    for labels in ([11], [-1], [], [[1]]):
        with pytest.raises(ValueError, match="numbers from 0 to 10"):
            pipe(labels)
    with pytest.raises(ValueError, match="latents are"):
        pipe([1, 2], latents=start())
    with pytest.raises(ValueError, match="steps is 1001"):
        pipe([1], num_inference_steps=1001)
    with pytest.raises(ValueError, match="DiCo's is fixed"):
        DiCoScheduler(beta_schedule="scaled_linear")
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="has no autoencoder"):
        pipe([1], num_inference_steps=2)
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        weights.load_pipeline(str(tmp_path))
    torn = tmp_path / "torn"
    weights.run_export(config(run), to=str(torn), format="diffusers", dtype="fp32")
    file = torn / "unet/diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    del stored["latent.0.conv1.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack latent\.0\.conv1\.weight"):
        weights.load_pipeline(str(torn))
