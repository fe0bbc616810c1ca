"""The actor pool: every piece once, fast actors do more, dead actors are replaced."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from dico_ray import pool
from dico_ray.config import ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@ray.remote(num_cpus=0)
class Worker:
    """Squares; a piece named in a file of `folder` kills its first worker, or names an error."""

    def __init__(self, folder: str = "", refuse: bool = False) -> None:
        if refuse:
            raise ConfigError("codec.vae: not there")
        self._folder = Path(folder)

    def work(self, piece: int) -> tuple[int, int]:
        deadly = self._folder / f"deadly-{piece}"
        if deadly.exists():
            deadly.unlink()
            os._exit(1)
        if (self._folder / f"always-{piece}").exists():
            os._exit(1)
        if (self._folder / f"wrong-{piece}").exists():
            raise ConfigError(f"piece {piece} is wrong")
        if (self._folder / f"slow-{os.getpid()}").exists():
            time.sleep(1.0)
        return piece * piece, os.getpid()


def _run(folder: Path, size: int, count: int, **settings: Any) -> list[tuple[int, tuple[int, int]]]:
    return list(pool.run(lambda: Worker.remote(str(folder), **settings), size, range(count)))


def test_every_piece_is_done_once_by_several_actors(tmp_path: Path) -> None:
    done = _run(tmp_path, 3, 40)
    assert sorted((piece, result[0]) for piece, result in done) == [(i, i * i) for i in range(40)]
    assert len({result[1] for _, result in done}) == 3


def test_pieces_of_dead_actors_are_done_by_others_and_counted_once(tmp_path: Path) -> None:
    for piece in (0, 7, 19):
        (tmp_path / f"deadly-{piece}").touch()
    done = _run(tmp_path, 2, 20)
    assert sorted((piece, result[0]) for piece, result in done) == [(i, i * i) for i in range(20)]
    assert not list(tmp_path.glob("deadly-*"))


def test_a_piece_that_kills_every_actor_ends_the_work(tmp_path: Path) -> None:
    (tmp_path / "always-3").touch()
    with pytest.raises(pool.PoolError, match="died in a row, the last on 3"):
        _run(tmp_path, 1, 5)


def test_an_error_of_the_work_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "wrong-2").touch()
    with pytest.raises(ConfigError, match="piece 2 is wrong"):
        _run(tmp_path, 2, 5)


def test_an_actor_that_cannot_start_tells_why(tmp_path: Path) -> None:
    with pytest.raises(pool.PoolError, match=r"codec\.vae: not there"):
        _run(tmp_path, 2, 5, refuse=True)


def test_ranges_cover_the_count() -> None:
    assert pool.ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert pool.ranges(4, 4) == [(0, 4)]
