"""Weights in and out: what is imported, sampled, exported and imported again is the same, bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dico_ray import cli, weight_files, weights
from dico_ray.config import Config, ConfigError
from dico_ray.data.shards import Manifest
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import Checkpoint

VAE = Path(__file__).parents[1] / "dico_ray" / "demo" / "weights" / "vae"


def tiny(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = create_model("DiCo-tiny", hidden_size=8, num_classes=10)
    return {name: torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as the released training writes it."""
    path = tmp_path_factory.mktemp("released") / "0000100.pt"
    args = argparse.Namespace(model="DiCo-tiny", image_size=64)
    torch.save({"model": tiny(1), "ema": tiny(2), "opt": {"state": {}, "param_groups": []}, "args": args}, path)
    return str(path)


def config(folder: Path, **sections: Any) -> Config:
    settings = {"run": {"storage": str(folder), "name": "in"}, "codec": {"vae": str(VAE)}, **sections}
    return build(settings)


def export(settings: Config, to: Path, format: str, dtype: str = "fp32") -> str:
    weights.run_export(settings, to=str(to), format=format, dtype=dtype)
    return str(to)


def test_an_imported_checkpoint_tells_all_it_knows(tmp_path: Path, released: str) -> None:
    checkpoint = weights.run_import(config(tmp_path), file=released, step=100)
    assert (checkpoint.step, checkpoint.kinds) == (100, ["ema", "weight"])
    assert same(checkpoint.tensors("weight"), tiny(1))
    assert same(checkpoint.tensors("ema"), tiny(2))
    model = weights.model_of(checkpoint)
    assert (model.architecture.hidden_size, model.num_classes, model.latent_size) == (8, 10, 8)
    assert checkpoint.about["codec"] == {"vae": str(VAE), "hash": ""}
    assert checkpoint.about["classes"] == [str(i) for i in range(10)]
    assert checkpoint.about["imported"]["from"] == released
    assert cli.parse("plan", ["--config", str(tmp_path / "in" / "config.yaml")])[0].model == model
    last = Checkpoint.last(Storage(str(tmp_path / "in" / "checkpoints")))
    assert last is not None
    assert last.hash == checkpoint.hash


@pytest.mark.parametrize("kind", ["ema", "model"])
@pytest.mark.parametrize(("format", "name"), [("safetensors", "w.safetensors"), ("released", "w.pt")])
def test_round_trips_are_exact(tmp_path: Path, released: str, format: str, name: str, kind: str) -> None:
    settings = config(tmp_path, sample={"weights": kind})
    weights.run_import(settings, file=released, step=1)
    first = export(settings, tmp_path / name, format)
    again = config(tmp_path, run={"storage": str(tmp_path), "name": "again"}, model={"latent_size": 8})
    imported = weights.run_import(again, file=first, step=0)
    assert same(imported.tensors("ema"), tiny(2 if kind == "ema" else 1))
    second = export(again, tmp_path / f"again-{name}", format)
    assert same(weight_files.read(first).weights["ema"], weight_files.read(second).weights["ema"])


def test_the_exported_files_are_what_others_read(tmp_path: Path, released: str) -> None:
    settings = config(tmp_path)
    weights.run_import(settings, file=released, step=100)
    path = export(settings, tmp_path / "new" / "w.safetensors", "safetensors")
    assert same(load_file(path), dict(sorted(tiny(2).items())) | tiny(2))
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert (about["format"], about["weights"], about["step"], about["latent_size"]) == ("pt", "ema", "100", "8")
    bare = torch.load(export(settings, tmp_path / "w.pt", "released"), weights_only=True)
    assert list(bare) == list(tiny(2))  # in the released order too
    assert same(bare, tiny(2))
    create_model("DiCo-tiny", hidden_size=8, num_classes=10).load_state_dict(bare)
    half = load_file(export(settings, tmp_path / "h.safetensors", "safetensors", "bf16"))
    assert {name: tensor.dtype for name, tensor in half.items()} == dict.fromkeys(tiny(2), torch.bfloat16)
    assert same(half, {name: tensor.bfloat16() for name, tensor in tiny(2).items()} | {})


def test_export_to_an_object_store_and_back(tmp_path: Path, released: str) -> None:
    weights.run_import(config(tmp_path), file=released, step=0)
    weights.run_export(config(tmp_path), to="memory://out/w.safetensors", format="safetensors", dtype="fp32")
    assert same(dict(weight_files.read("memory://out/w.safetensors").weights["ema"]), tiny(2))


def test_a_run_is_not_mixed_with_another_import_or_training(tmp_path: Path, released: str) -> None:
    settings = config(tmp_path)
    weights.run_import(settings, file=released, step=5)
    with pytest.raises(ConfigError, match="has step 5"):
        weights.run_import(settings, file=released, step=5)
    weights.run_import(settings, file=released, step=6)
    here = tmp_path / "in" / "checkpoints" / "step-00000006" / "commit.json"
    marker = json.loads(here.read_text())
    del marker["about"]["imported"]
    here.write_text(json.dumps(marker))
    with pytest.raises(ConfigError, match="checkpoints of its own training"):
        weights.run_import(settings, file=released, step=7)
    with pytest.raises(ConfigError, match="--step -1"):
        weights.run_import(settings, file=released, step=-1)


def test_what_a_checkpoint_does_not_hold_is_said(tmp_path: Path) -> None:
    torch.save(tiny(2), tmp_path / "ema.pt")
    settings = config(tmp_path, sample={"weights": "model"})
    weights.run_import(settings, file=str(tmp_path / "ema.pt"))
    with pytest.raises(ConfigError, match=r"holds no weight, only ema; set sample\.weights"):
        export(settings, tmp_path / "w.pt", "released")


def test_training_does_not_continue_what_has_no_optimizer_state(tmp_path: Path, released: str, latents: Path) -> None:
    from dico_ray import train

    settings = config(tmp_path, data={"latents": str(latents)})
    weights.run_import(settings, file=released, step=5)
    with pytest.raises(ConfigError, match=r"no optimizer state to continue from; take another run\.name"):
        train.check_resumes(settings, Manifest.load(Storage(str(latents))))


@pytest.mark.parametrize(
    ("to", "format", "dtype", "says"),
    [
        ("", "safetensors", "fp32", r"--to \(unset\): .* a file ending in \.safetensors"),
        ("w.pt", "safetensors", "fp32", r"ending in \.safetensors"),
        ("w.safetensors", "released", "fp32", r"ending in \.pt or \.pth"),
        ("", "diffusers", "fp32", "a folder"),
        ("w.pt", "onnx", "fp32", "take one of safetensors, released, diffusers"),
        ("w.pt", "released", "fp8", "take one of fp32, bf16"),
    ],
)
def test_impossible_exports_are_refused(tmp_path: Path, to: str, format: str, dtype: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        weights.run_export(config(tmp_path), to=to, format=format, dtype=dtype)


def test_a_pipeline_is_not_exported_with_a_solver_that_it_lacks(tmp_path: Path) -> None:
    settings = config(tmp_path, sample={"method": "dpm++2m"})
    with pytest.raises(ConfigError, match=r"sample\.method: dpm\+\+2m; a pipeline is exported with ddpm or ddim"):
        weights.run_export(settings, to=str(tmp_path / "out"), format="diffusers", dtype="fp32")


def test_the_command_line(tmp_path: Path, released: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--run.storage", str(tmp_path), "--run.name", "c"]
    assert cli.main(["import", released, *own, "--step", "9"]) == 0
    said = capsys.readouterr().out
    assert "ema and weight of step 9" in said
    assert "optimizer's state is not imported" in said
    assert "is assumed, and not checked" in said
    assert cli.main(["export", *own, "--to", str(tmp_path / "o.safetensors")]) == 0
    assert same(load_file(tmp_path / "o.safetensors"), tiny(2))
    for words in (
        ["import", str(tmp_path / "none.pt"), *own],
        ["import", released, *own, "--model.name", "DiCo-XL", "--step", "3"],
        ["export", *own, "--run.name", "nobody", "--to", str(tmp_path / "x.safetensors")],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_images_come_from_an_imported_checkpoint(tmp_path: Path, released: str) -> None:
    from dico_ray import sample

    drawn = {"count": 12, "steps": 3, "batch_size": 6, "grid_rows": 1}
    settings = config(tmp_path, sample=drawn, resources={"threads": 1})
    weights.run_import(settings, file=released, step=100)
    sample.main(settings)
    run = tmp_path / "in" / "samples"
    assert len(list((run / "images").rglob("*.png"))) == 12
    record = json.loads((run / "samples.json").read_text())
    assert record["step"] == 100
    # That no one knows the autoencoder of the training latents is part of the record.
    assert (record["codec"]["hash"], record["decoder"], record["decoder_checked"]) == ("", str(VAE), False)
