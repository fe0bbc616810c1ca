"""Checkpoints: only whole, committed and unchanged ones are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as from_safetensors

from dico_ray.config import ConfigError
from dico_ray.models import create_model, mup
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training.checkpoint import COMMIT, Checkpoint, CheckpointError, Retention
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.snapshot import Snapshot
from tests.training.saving import claimed, save

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
        save(Storage(str(tmp_path)), step, *trained, {"made": "by a test"})
    return Storage(str(tmp_path))


def at(storage: Storage, step: int) -> Storage:
    """The folder of a step's checkpoint."""
    (name,) = [f.name for f in checkpoints.find(storage) if f.step == step]
    return storage.at(name)


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
    at(saved, 20).remove(COMMIT)
    last = Checkpoint.last(saved)
    assert last is not None
    assert last.step == 10
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        Checkpoint.open(at(saved, 20))


def test_a_changed_byte_is_found_and_placed(saved: Storage) -> None:
    here = at(saved, 20)
    part = here.names(".safetensors")[0]
    data = bytearray(here.read(part))
    data[-3] ^= 1
    here.write(part, bytes(data))
    kinds = Checkpoint.open(here).kinds
    with pytest.raises(CheckpointError, match=rf"{part} at byte \d+: the bytes differ"):
        [Checkpoint.open(here).tensors(kind) for kind in kinds]


def test_a_lost_part_is_named(saved: Storage) -> None:
    here = at(saved, 20)
    here.remove(here.names(".safetensors")[0])
    with pytest.raises(CheckpointError, match="the file is gone"):
        Checkpoint.open(here).tensors("ema")


def test_a_marker_that_is_damaged_or_of_another_format_is_refused(saved: Storage) -> None:
    here = at(saved, 20)
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
        save(saved, step, *trained, {})
    torn = at(saved, 30)
    torn.remove(COMMIT)
    attempt = claimed(saved)
    saved.write(f"{checkpoints.folder_name(50, attempt.name)}/rank-00000-part-000.safetensors", b"still being written")
    assert checkpoints.retain(saved, Retention(last=2)) == [torn.url]
    assert [f.step for f in checkpoints.find(saved)] == [20, 40, 50]


def test_retention_keeps_every_nth_and_the_best(tmp_path: Path, trained: tuple[Engine, EMA]) -> None:
    storage, rule = Storage(str(tmp_path)), Retention(last=1, every=20, best=2, metric="fid")
    for step, fid in ((10, 3.0), (20, 9.0), (30, 4.0), (40, 8.0), (50, 5.0), (60, 7.0)):
        save(storage, step, *trained, {"metrics": {"fid": fid}}, rule)
    assert [f.step for f in checkpoints.find(storage)] == [10, 20, 30, 40, 60]


def test_numbers_are_cut_into_parts_of_a_stated_size(tmp_path: Path, trained: tuple[Engine, EMA]) -> None:
    tensors = checkpoints.state(*trained)
    snapshot = Snapshot(tensors, torch.device("cpu"), part_bytes=4096)
    snapshot.take(tensors)
    assert len(snapshot.parts) > 10
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part in snapshot.parts:
        assert part.data.numel() < 4096 + 8192
        for key, tensor in from_safetensors(part.data.numpy().tobytes()).items():
            name, start = key.rsplit("@", 1)
            found.setdefault(name, []).append((int(start), tensor))
    for key, tensor in tensors:
        name, start = key.rsplit("@", 1)
        pieces = sorted(p for p in found[name] if p[0] >= int(start))
        assert torch.equal(torch.cat([p for _, p in pieces])[: len(tensor)], tensor)


def test_nothing_is_pickled(saved: Storage) -> None:
    for name in saved.names():
        assert name.endswith((".safetensors", ".json"))


def test_a_run_with_two_learning_rates_goes_on_at_another_stage(one_process: None, tmp_path: Path) -> None:
    """muP's two groups lie in flat parts of their own; checkpoints know parameters by name alone."""

    def make(stage: int) -> tuple[Engine, EMA]:
        torch.manual_seed(0)
        model = create_model("DiCo-tiny", hidden_size=8, depths=(1,) * 5, num_classes=10, class_dropout_prob=0.0)
        mup.initialize(model, 4)
        settings = {"global_batch": 4, "precision": "fp32", "zero_stage": stage, "lr": 1e-3}
        engine = Engine(model, build({"train": settings}).train, torch.device("cpu"), mup.learning_rates(model, 4))
        return engine, EMA(engine, 0.5)

    def train(engine: Engine, ema: EMA, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x, wanted = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 8, 8, 8, generator=generator)
            engine.backward((engine(x, torch.arange(4), torch.arange(4)) - wanted).square().mean())
            ema.update(step)

    whole = make(1)
    train(*whole, range(1, 5))
    straight = save(Storage(str(tmp_path / "straight")), 4, *whole, {})
    half = make(2)
    train(*half, range(1, 3))
    stopped = save(Storage(str(tmp_path / "parts")), 2, *half, {})
    again = make(3)
    checkpoints.restore(stopped, *again)
    train(*again, range(3, 5))
    continued = save(Storage(str(tmp_path / "parts")), 4, *again, {})
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        expected, found = straight.tensors(kind), continued.tensors(kind)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")
    for engine, _ in (whole, half, again):
        engine.close()
