"""The actor pool: every piece once, fast actors do more, dead actors are replaced."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError, OutOfMemoryError

from dico_ray import pool
from dico_ray.config import ConfigError
from dico_ray.metrics import Features, Statistics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@ray.remote(num_cpus=0)
class Worker:
    """Squares; a piece named in a file of `folder` kills its first worker, or names an error."""

    def __init__(self, folder: str = "", refuse: bool = False) -> None:
        if refuse:
            raise ConfigError("codec.vae: not there")
        self._folder = Path(folder)
        (self._folder / f"here-{os.getpid()}").touch()

    def work(self, piece: int) -> tuple[int, int]:
        while (self._folder / "together").exists() and len(list(self._folder.glob("here-*"))) < 3:
            time.sleep(0.01)
        deadly = self._folder / f"deadly-{piece}"
        if deadly.exists():
            deadly.unlink()
            os._exit(1)
        if (self._folder / f"always-{piece}").exists():
            os._exit(1)
        if (self._folder / f"starved-{piece}").exists():
            raise OutOfMemoryError("a process of its was killed\nthe node has 3 GB\nread this and that")
        if (self._folder / f"wrong-{piece}").exists():
            raise ConfigError(f"piece {piece} is wrong")
        if (self._folder / f"slow-{os.getpid()}").exists() or (self._folder / "slow").exists():
            time.sleep(1.0)
        return piece * piece, os.getpid()


def _run(folder: Path, size: int, count: int, ahead: int = 0, **settings: Any) -> list[tuple[int, tuple[int, int]]]:
    return list(pool.run(lambda: Worker.remote(str(folder), **settings), size, range(count), ahead=ahead))


@pytest.mark.parametrize("ahead", [0, 2])
def test_every_piece_is_done_once_by_several_actors(tmp_path: Path, ahead: int) -> None:
    (tmp_path / "together").touch()  # the first to be up wait for the others
    done = _run(tmp_path, 3, 40, ahead)
    assert sorted((piece, result[0]) for piece, result in done) == [(i, i * i) for i in range(40)]
    assert len({result[1] for _, result in done}) == 3


@pytest.mark.parametrize("ahead", [0, 1])
def test_pieces_of_dead_actors_are_done_by_others_and_counted_once(tmp_path: Path, ahead: int) -> None:
    for piece in (0, 7, 19):
        (tmp_path / f"deadly-{piece}").touch()
    done = _run(tmp_path, 2, 20, ahead)
    assert sorted((piece, result[0]) for piece, result in done) == [(i, i * i) for i in range(20)]
    assert not list(tmp_path.glob("deadly-*"))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_piece_that_kills_every_actor_ends_the_work(tmp_path: Path, ahead: int) -> None:
    """By five deaths, each counted once, whatever waited at the actor."""
    (tmp_path / "always-3").touch()
    with pytest.raises(pool.PoolError, match="5 actors died (in a row, the last )?on 3") as caught:
        _run(tmp_path, 1, 8, ahead)
    assert len(str(caught.value).splitlines()) == 1
    assert ": The actor is dead because " in str(caught.value)


def test_who_tells_of_a_process_s_death_tells_at_which_piece(tmp_path: Path) -> None:
    """Whatever else the actor is at meanwhile: it does three at once."""
    (tmp_path / "starved-3").touch()
    (tmp_path / "slow").touch()
    work = pool.run(lambda: Worker.options(max_concurrency=3).remote(str(tmp_path)), 1, range(8), ahead=2)
    with pytest.raises(pool.PoolError, match="5 actors died (in a row, the last )?on 3: ") as caught:
        list(work)
    assert ": a process of its was killed the node has 3 GB; see that " in str(caught.value)


@ray.remote(num_cpus=3)
class Unreachable:
    """The first one lives on, but its call fails as if the line to it were cut, or a process of its own killed."""

    def __init__(self, folder: str, killed: bool) -> None:
        self._cut, self._killed = Path(folder) / "cut", killed

    def work(self, piece: int) -> int:
        if not self._cut.exists():
            self._cut.touch()
            raise OutOfMemoryError("it was the largest") if self._killed else ActorUnavailableError("it is cut", None)
        return piece


@pytest.mark.parametrize("killed", [False, True])
def test_an_actor_that_cannot_go_on_makes_room_for_the_next(tmp_path: Path, killed: bool) -> None:
    """Four CPUs hold one of them."""
    done = pool.run(lambda: Unreachable.remote(str(tmp_path), killed), 1, range(3), start_timeout_s=15)
    assert sorted(done) == [(0, 0), (1, 1), (2, 2)]


@ray.remote(num_cpus=0, max_concurrency=2)
class Pair:
    """Finishes piece 0 only after piece 1 has begun at the same actor."""

    def __init__(self) -> None:
        self._second = threading.Event()

    def work(self, piece: int) -> bool:
        if piece == 1:
            self._second.set()
        return self._second.wait(30) if piece == 0 else True


def test_an_actor_has_its_next_piece_before_the_first_is_done() -> None:
    assert dict(pool.run(Pair.remote, 1, range(4), ahead=1)) == dict.fromkeys(range(4), True)


@ray.remote(num_cpus=0)
class Meeting:
    """Finishes a piece only when two have begun, which takes two actors."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def work(self, piece: int) -> bool:
        (self._folder / f"begun-{piece}").touch()
        until = time.monotonic() + 30
        while len(list(self._folder.glob("begun-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        return time.monotonic() < until


def test_the_last_pieces_are_left_to_who_is_free(tmp_path: Path) -> None:
    assert dict(pool.run(lambda: Meeting.remote(str(tmp_path)), 2, range(2), ahead=1)) == {0: True, 1: True}


def test_an_error_of_the_work_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "wrong-2").touch()
    with pytest.raises(ConfigError, match="piece 2 is wrong"):
        _run(tmp_path, 2, 5)


def test_an_actor_that_cannot_start_tells_why(tmp_path: Path) -> None:
    with pytest.raises(pool.PoolError, match=r"codec\.vae: not there"):
        _run(tmp_path, 2, 5, refuse=True)


def test_standing_actors_are_given_out_once() -> None:
    take = pool.standing(["first", "second"])
    assert [take(), take()] == ["first", "second"]
    with pytest.raises(pool.PoolError, match="an actor died while the pool was timed"):
        take()


def test_ranges_cover_the_count() -> None:
    assert pool.ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert pool.ranges(4, 4) == [(0, 4)]


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 60),
    size=st.integers(1, 20),
    done=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=5),
)
def test_what_remains_and_what_is_done_cover_each_index(count: int, size: int, done: list[tuple[int, int]]) -> None:
    finished = [(start, min(start + length, count)) for start, length in done if start <= count]
    left = pool.remaining(count, finished, size)
    assert all(0 < stop - start <= size for start, stop in left)
    indices = [i for start, stop in left for i in range(start, stop)]
    assert sorted(indices) == sorted(set(range(count)) - {i for start, stop in finished for i in range(start, stop)})


@ray.remote(num_cpus=0)
class FeatureWorker:
    """Features of index ranges, each after a while; leaves its process id in `folder`, and what it was at."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        (self._folder / f"alive-{os.getpid()}").touch()

    def work(self, piece: tuple[int, int]) -> Features:
        (self._folder / f"holds-{os.getpid()}").touch()
        time.sleep(0.05)
        (self._folder / f"holds-{os.getpid()}").unlink()
        rows = [torch.randn(12, generator=torch.Generator().manual_seed(index)) for index in range(*piece)]
        return Features(torch.stack(rows))


def _kill_one(folder: Path, pattern: str, done: threading.Event) -> bool:
    """Kills a worker that a file of this pattern names; waits for one."""
    while not done.is_set():
        for path in folder.glob(pattern):
            try:
                os.kill(int(path.name.rpartition("-")[2]), signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                (folder / f"alive-{path.name.rpartition('-')[2]}").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            return True
        time.sleep(0.001)
    return False


def test_actors_that_die_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """Killed while they hold an unfinished range, and at any moment after they delivered others."""
    work, done, kills = pool.ranges(600, 7), threading.Event(), []

    def killer() -> None:
        rng = random.Random(0)
        for pattern in ("holds-*", "alive-*", "holds-*", "alive-*"):
            done.wait(rng.uniform(0.2, 0.6))
            kills.append(_kill_one(tmp_path, pattern, done))

    thread = threading.Thread(target=killer)
    thread.start()
    disturbed = Statistics()
    try:
        for (start, _), part in pool.run(lambda: FeatureWorker.remote(str(tmp_path)), 2, work):
            disturbed.add(start, part)  # raises if an index came twice
    finally:
        done.set()
        thread.join()
    assert kills.count(True) == 4
    whole = Statistics()
    rows = [torch.randn(12, generator=torch.Generator().manual_seed(index)) for index in range(600)]
    whole.add(0, Features(torch.stack(rows)))
    assert disturbed.count == 600
    assert torch.equal(disturbed.features(), whole.features())
    assert disturbed.pool is not None
    assert whole.pool is not None
    for found, wanted in zip(disturbed.pool.compute(), whole.pool.compute(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_who_stops_early_leaves_no_actor(tmp_path: Path) -> None:
    results = pool.run(lambda: FeatureWorker.remote(str(tmp_path)), 2, pool.ranges(400, 4))
    next(results)
    results.close()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{path.name[6:]}").exists() for path in tmp_path.glob("alive-*")):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_actors_without_room_hold_nothing_up(tmp_path: Path) -> None:
    """Three are wanted; there is room for one of four CPUs at a time."""
    one = FeatureWorker.options(num_cpus=3)
    done = dict(pool.run(lambda: one.remote(str(tmp_path)), 3, pool.ranges(60, 10)))
    assert len(done) == 6


def test_no_room_at_all_is_told(tmp_path: Path) -> None:
    one = FeatureWorker.options(num_cpus=3, resources={"unheard_of": 1})
    with pytest.raises(pool.PoolError, match=r"no actor of the pool found room within 1 s; free are \d"):
        list(pool.run(lambda: one.remote(str(tmp_path)), 1, [(0, 1)], start_timeout_s=1))
