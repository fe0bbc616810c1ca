"""Attempts: the newest alone may commit, and what an older one commits all the same is never read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dico_ray.storage import Storage
from dico_ray.training import attempts
from dico_ray.training.attempts import Attempt, FencedError
from dico_ray.training.checkpoint import COMMIT, Checkpoint, folder_name


def commit(storage: Storage, step: int, attempt: Attempt) -> None:
    here = storage.at(folder_name(step, attempt.name))
    text = f'{{"format": "dico-ray-checkpoint/1", "step": {step}, "shapes": {{}}, "parts": [], "about": {{}}}}'
    here.write(COMMIT, text.encode())


def last(storage: Storage) -> int:
    found = Checkpoint.last(storage)
    return found.step if found else 0


def test_a_newer_launch_fences_the_older_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = attempts.settle(storage, attempts.claim(storage, "a", None), 0)
    again = attempts.claim(storage, "a", first)  # its own next attempt is no rival
    assert again.name > first.name
    newer = attempts.claim(storage, "b", None)
    for mine in (first, again):
        with pytest.raises(FencedError, match=rf"taken over \(attempt {newer.name} of process \d+ on .*run\.name"):
            attempts.check(mine, attempts.read(storage))
    with pytest.raises(FencedError):
        attempts.claim(storage, "a", again)
    attempts.check(newer, attempts.read(storage))


def test_commits_of_a_replaced_attempt_beyond_the_newer_one_s_base_are_void(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    old = attempts.settle(storage, attempts.claim(storage, "a", None), 0)
    commit(storage, 10, old)
    new = attempts.claim(storage, "b", None)
    commit(storage, 20, old)  # in time: the newer one has not settled where it begins
    assert last(storage) == 20
    new = attempts.settle(storage, new, 20)
    commit(storage, 30, old)  # a zombie's
    assert last(storage) == 20
    commit(storage, 25, new)
    assert last(storage) == 25


def test_of_two_claims_at_once_all_agree_which_is_newer(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    one = attempts.claim(storage, "a", None)
    number = one.name.partition("-")[0]
    twin = Attempt(f"{number}-ffffffff", "b", None, "elsewhere", 1, 0.0)
    storage.write(f"attempts/{twin.name}.json", (tmp_path / f"attempts/{one.name}.json").read_bytes()
                  .replace(one.name.encode(), twin.name.encode()).replace(b'"a"', b'"b"'))  # fmt: skip
    with pytest.raises(FencedError):
        attempts.check(one, attempts.read(storage))
    attempts.check(twin, attempts.read(storage))
