from __future__ import annotations

from pathlib import Path

import pytest

from dico_ray.config import ConfigError
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training import checkpoint as checkpoints
from dico_ray.training.checkpoint import Retention
from dico_ray.training.evaluations import FOLDER, Evaluations, results, scores_of
from dico_ray.weights import find_checkpoint

RESULT = {
    "fid": 12.5, "frechet_distance": 12.5, "sfid": None, "comparable_with_published_fid": False, "images": 5000,
    "reference_images": 10_000, "label": "FID-5K", "judge": {"name": "j", "images": 0.75}, "provenance": {"seed": 0},
}  # fmt: skip


def committed(storage: Storage, step: int, loss: float, best_metric: str = "loss") -> str:
    """A checkpoint without numbers, as far as retention looks."""
    name = checkpoints.folder_name(step)
    about = {"metrics": {"step": step, "loss": loss}, "config": {"train": {"best_metric": best_metric}}}
    checkpoints.commit(storage.at(name), step, {}, [], about)
    return name


def test_steps_of_ours_and_the_last_are_due_until_they_are_settled(tmp_path: Path) -> None:
    evaluations = Evaluations(Storage(str(tmp_path)), every=20, last=50)
    for step in (10, 20, 30, 40, 50):
        evaluations.committed(f"step-{step:08d}-000001-3f6c09aa", step)
    assert evaluations.due() == [f"step-{step:08d}-000001-3f6c09aa" for step in (20, 40, 50)]
    evaluations.settle("step-00000040-000001-3f6c09aa")
    evaluations.settle("step-00000040-000001-3f6c09aa")
    assert len(evaluations.due()) == 2


def test_results_are_read_back_by_step_with_their_numbers(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    evaluations = Evaluations(run, 10, 50)
    evaluations.keep("b", 20, {**RESULT, "fid": 9.0}, b"png")
    evaluations.keep("a", 10, RESULT, b"png")
    evaluations.keep("c", 30, None, b"png")
    evaluations.committed("d", 40)
    assert [r["step"] for r in results(run.at(FOLDER))] == [10, 20, 30]
    assert evaluations.scores("fid") == {"a": 12.5, "b": 9.0}
    assert scores_of(RESULT) == {"fid": 12.5, "frechet_distance": 12.5, "judge_rate": 0.75, "evaluation_images": 5000}


def test_what_waits_stays_and_the_best_are_those_that_were_judged_best(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    storage, evaluations = run.at("checkpoints"), Evaluations(run, 10, 60)
    rule = Retention(last=1, best=1, metric="fid")
    for step in (10, 20, 30):
        name = committed(storage, step, 1.0)
        evaluations.committed(name, step)
        checkpoints.retain(storage, rule, evaluations)
        assert len(checkpoints.find(storage)) == step // 10  # all wait
    for step, fid in ((10, 5.0), (20, 3.0), (5, 1.0)):  # that of step 5 is gone
        name = checkpoints.folder_name(step)
        evaluations.keep(name, step, {**RESULT, "fid": fid}, b"png")
        evaluations.settle(name)
    checkpoints.retain(storage, rule, evaluations)
    assert [f.step for f in checkpoints.find(storage)] == [20, 30]


def test_the_best_is_by_what_training_logged_or_an_evaluation_found(tmp_path: Path) -> None:
    config = build({"run": {"storage": str(tmp_path), "name": "run"}, "sample": {"checkpoint": "best"}})
    run = Storage(config.run.folder)
    with pytest.raises(ConfigError, match="has no committed checkpoint"):
        find_checkpoint(config)
    for step, loss in ((10, 0.3), (20, 0.2), (30, 0.25)):
        committed(run.at("checkpoints"), step, loss, "loss")
    assert find_checkpoint(config).step == 20
    committed(run.at("checkpoints"), 40, 0.5, "fid")
    with pytest.raises(ConfigError, match=r"^sample\.checkpoint: 'best', .* has train\.best_metric = fid; take 'last'"):
        find_checkpoint(config)
    Evaluations(run, 10, 40).keep(checkpoints.folder_name(30), 30, RESULT, b"png")
    assert find_checkpoint(config).step == 30


def test_only_steps_with_checkpoints_can_be_evaluated() -> None:
    with pytest.raises(ConfigError, match=r"^evaluate\.every: 15 is no multiple of train\.checkpoint_every = 10"):
        build({"evaluate": {"every": 15}, "train": {"checkpoint_every": 10}})
    assert Evaluations.of(build({})) is None
    assert Evaluations.of(build({"evaluate": {"every": 20_000}})) is not None
