"""`dico-ray ema` on a run of a hundred small steps, made without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dico_ray import cli, sample, weights
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training.checkpoint import COMMIT, Checkpoint
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from tests.training.saving import save_averages

pytestmark = pytest.mark.ray

STEPS, EVERY = 100, 10
MODEL = {"name": "DiCo-tiny", "hidden_size": 4, "depths": [1] * 5, "num_classes": 10, "latent_size": 4}


class Made(NamedTuple):
    folder: Path
    kept: dict[int, list[dict[str, torch.Tensor]]]  # by step: the average of width 0.075, kept directly; the weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Made:
    """A run of stage 1 with snapshots of two widths, and beside it a third width without snapshots."""
    folder = tmp_path_factory.mktemp("ema")
    config = build({"model": MODEL, "run": {"storage": str(folder), "name": "small"},
                    "train": {"global_batch": 4, "precision": "fp32", "lr": 1e-3}})  # fmt: skip
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=4, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
    engine = Engine(model, config.train, torch.device("cpu"))
    ema, direct = EMA(engine, 0.9, (0.05, 0.1)), EMA(engine, 0.9, (0.075,))
    about = {"config": config.model_dump(mode="json"), "codec": {"vae": "none", "hash": "none"},
             "classes": list("0123456789")}  # fmt: skip
    averages, kept = Storage(str(folder / "small" / checkpoints.AVERAGES)), {}
    fragments = engine.fragments()
    for step in range(1, STEPS + 1):
        output = engine(torch.randn(4, 4, 4, 4), torch.arange(4), torch.arange(4))
        engine.backward((output - torch.randn_like(output)).square().mean())
        ema.update(step)
        direct.update(step)
        if step % EVERY == 0:
            save_averages(averages, step, engine, ema, about)
        if step in (75, STEPS):
            both = direct.tensors("ema-0.075"), [f.weight for f in fragments]
            kept[step] = [{f.name: t.clone() for f, t in zip(fragments, ts, strict=True)} for ts in both]
    engine.close()
    return Made(folder, kept)


def ema(made: Made, *words: str) -> int:
    return cli.main(["ema", "--run.storage", str(made.folder), "--run.name", "small", *words])


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


@pytest.mark.parametrize(
    ("words", "step", "error", "tolerance"), [([], STEPS, 0.01, 0.06), (["--step", "75"], 75, 0.5, 0.3)]
)
def test_it_equals_the_average_kept_directly(
    made: Made, words: list[str], step: int, error: float, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """To 6% of the way from the average to the weights with ten coarse snapshots; to 30% half-way between two."""
    assert ema(made, "--sigma", "0.075", *words) == 0
    url = str(made.folder / "small" / "ema-0.075" / f"step-{step:08d}")
    said = capsys.readouterr().out
    assert url in said
    assert "relative error of its profile" in said
    found = Checkpoint.open(Storage(url))
    assert (found.step, found.kinds) == (step, ["ema"])
    record = found.about["posthoc"]
    assert record["sigma_rel"] == 0.075
    assert 0 < record["error"] < error
    assert ("snapshots taken more often" in said) == (error > 0.05)
    average, weights = map(flat, made.kept[step])
    assert (flat(found.tensors("ema")) - average).norm() < tolerance * (average - weights).norm()


def test_a_width_that_was_kept_comes_back(made: Made) -> None:
    ema(made, "--sigma", "0.1")
    found = Checkpoint.open(Storage(str(made.folder / "small" / "ema-0.100" / f"step-{STEPS:08d}"))).tensors("ema")
    kept = Checkpoint.all(Storage(str(made.folder / "small" / "averages")))[-1].tensors("ema-0.100")
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_sample_takes_what_it_writes(made: Made) -> None:
    ema(made, "--sigma", "0.2")
    url = str(made.folder / "small" / "ema-0.200" / f"step-{STEPS:08d}")
    config = build({"sample": {"checkpoint": url}})
    found = weights.find_checkpoint(config)
    record = sample.provenance(config, found)
    assert (record["step"], record["classes"]) == (STEPS, list("0123456789"))
    network = weights.load_network(found, config)
    assert torch.equal(flat(dict(network.named_parameters())).detach(), flat(found.tensors("ema")))


@pytest.mark.parametrize(("words", "says"), [
    (["--sigma", "0.28"], "--sigma 0.28: a relative width lies between 0 and 0.28"),
    (["--sigma", "nan"], "--sigma nan"),
    (["--sigma", "0.0755"], "more than three decimals"),
    (["--sigma", "0.1", "--step", "101"], "end at step 100; take 1 to 100"),
    (["--sigma", "0.1", "--step", "-1"], "--step -1"),
    (["--sigma", "0.1", "--run.name", "nobody"], "has no snapshots of averages; train with train.ema_profiles"),
    ([], "--sigma"),
])  # fmt: skip
def test_what_cannot_be_had(made: Made, words: list[str], says: str, capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit) as stop:
        ema(made, *words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert says in said


def test_a_torn_snapshot_does_not_count(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (marker,) = (made.folder / "small" / "averages").glob(f"step-00000100-*/{COMMIT}")
    text = marker.read_text()
    marker.unlink()
    try:
        assert ema(made, "--sigma", "0.075") == 0
    finally:
        marker.write_text(text)
    assert "step-00000090" in capsys.readouterr().out
    assert json.loads(text)["step"] == STEPS
