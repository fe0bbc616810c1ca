"""Checkpoints: only whole, committed and unchanged ones are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dico_ray.config import ConfigError
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training.checkpoint import COMMIT, Checkpoint, CheckpointError
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(one_process: None) -> tuple[Engine, EMA]:
    """A small engine on one process, its moments and EMA away from zero."""
    torch.manual_seed(0)
    model = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
    train = build({"train": {"global_batch": 4, "precision": "fp32", "zero_stage": 1}}).train
    engine = Engine(model, train, torch.device("cpu"))
    ema = EMA(engine, 0.5, (0.05, 0.1))
    for step in (1, 2):
        output = engine(torch.randn(4, 4, 8, 8), torch.arange(4), torch.arange(4))
        engine.backward((output - torch.randn_like(output)).square().mean())
        ema.update(step)
    return engine, ema


@pytest.fixture
def saved(trained: tuple[Engine, EMA], tmp_path: Path) -> Storage:
    for step in (10, 20):
        checkpoints.save(Storage(str(tmp_path)), step, *trained, {"made": "by a test"})
    return Storage(str(tmp_path))


def test_what_was_saved_is_read_back_whole_and_by_ranges(trained: tuple[Engine, EMA], saved: Storage) -> None:
    engine, ema = trained
    last = Checkpoint.last(saved)
    assert last is not None
    assert (last.step, last.about) == (20, {"made": "by a test"})
    weights = last.tensors("weight")
    for fragment, average in zip(engine.fragments(), ema.tensors(), strict=True):
        assert torch.equal(weights[fragment.name].flatten()[fragment.start : fragment.stop], fragment.weight)
        assert torch.equal(last.read("ema", fragment.name, fragment.start, fragment.stop), average)
        middle = (fragment.start + fragment.stop) // 2
        part = last.read("exp_avg", fragment.name, middle, fragment.stop)
        assert torch.equal(part, fragment.exp_avg[middle - fragment.start :])
    assert any(f.exp_avg_sq.abs().max() > 0 for f in engine.fragments())


def test_a_folder_without_a_marker_does_not_count(saved: Storage) -> None:
    saved.remove(f"step-00000020/{COMMIT}")
    last = Checkpoint.last(saved)
    assert last is not None
    assert last.step == 10
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        Checkpoint.open(saved.at("step-00000020"))


def test_a_changed_byte_is_found_and_placed(saved: Storage) -> None:
    here = saved.at("step-00000020")
    part = here.names(".safetensors")[0]
    data = bytearray(here.read(part))
    data[-3] ^= 1
    here.write(part, bytes(data))
    kinds = Checkpoint.open(here).kinds
    with pytest.raises(CheckpointError, match=rf"{part} at byte \d+: the bytes differ"):
        [Checkpoint.open(here).tensors(kind) for kind in kinds]


def test_a_lost_part_is_named(saved: Storage) -> None:
    here = saved.at("step-00000020")
    here.remove(here.names(".safetensors")[0])
    with pytest.raises(CheckpointError, match="the file is gone"):
        Checkpoint.open(here).tensors("ema")


def test_a_marker_that_is_damaged_or_of_another_format_is_refused(saved: Storage) -> None:
    here = saved.at("step-00000020")
    here.write(COMMIT, b'{"format": ')
    with pytest.raises(CheckpointError, match="not JSON"):
        Checkpoint.open(here)
    here.write(COMMIT, json.dumps({"format": "other/9"}).encode())
    with pytest.raises(CheckpointError, match="dico-ray-checkpoint/1"):
        Checkpoint.open(here)


def test_another_model_is_refused_by_name(saved: Storage) -> None:
    last = Checkpoint.last(saved)
    assert last is not None
    wider = create_model("DiCo-tiny", hidden_size=16, depths=(1,) * 5, num_classes=10)
    with pytest.raises(ConfigError, match=r"another model: decoder_level_1.* is \(96,\) there and \(192,\) here"):
        last.check_fits({n: tuple(p.shape) for n, p in wider.named_parameters()})
    with pytest.raises(CheckpointError, match="has 0 of the 5 elements"):
        last.read("weight", "no.such.parameter", 0, 5)


def test_retention_keeps_the_newest_and_drops_older_torn_ones(saved: Storage, trained: tuple[Engine, EMA]) -> None:
    for step in (30, 40):
        checkpoints.save(saved, step, *trained, {})
    saved.remove(f"step-00000030/{COMMIT}")
    saved.write("step-00000050/part-00000-of-00001.safetensors", b"still being written")
    checkpoints.retain(saved, keep=2)
    assert saved.folders() == ["step-00000020", "step-00000040", "step-00000050"]


def test_nothing_is_pickled(saved: Storage) -> None:
    for name in saved.names():
        assert name.endswith((".safetensors", ".json"))
