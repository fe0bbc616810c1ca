"""A pool of Ray actors that takes work from a queue: fast actors do more, dead ones are replaced.

Each piece of work is done by one call and counted once: a piece whose actor died is given out again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dico_ray.config import UserError

_MOST_DEATHS_IN_A_ROW = 5


class PoolError(UserError):
    """Actors cannot start, or died again and again without finishing anything."""


def ranges(count: int, size: int) -> list[tuple[int, int]]:
    """[0, count) cut into (start, stop) of at most `size`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def run(make_actor: Callable[[], Any], size: int, work: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields (piece, result) for every piece of `work`, in the order they are finished.

    make_actor: starts an actor with a method `work(piece)`. size: actors at a time. An exception that the
    method raises is raised here. Raises PoolError if an actor cannot start, and after five deaths
    of actors with no piece finished between.
    """
    waiting = deque(work)
    idle = [make_actor() for _ in range(min(size, len(waiting)))]
    running: dict[Any, tuple[Any, Any]] = {}
    deaths = 0
    while waiting or running:
        while waiting and idle:
            actor, piece = idle.pop(), waiting.popleft()
            running[actor.work.remote(piece)] = (actor, piece)
        for reference in ray.wait(list(running), num_returns=1)[0]:
            actor, piece = running.pop(reference)
            try:
                result = ray.get(reference)
            except RayActorError as error:
                if error.actor_init_failed:  # its message is a trace that ends with the reason
                    raise PoolError(str(error).strip().splitlines()[-1].partition("Error: ")[2]) from error
                deaths += 1
                if deaths >= _MOST_DEATHS_IN_A_ROW:
                    raise PoolError(
                        f"{deaths} actors died in a row, the last on {piece}: {error}; see that one fits into a node's "
                        "memory (lower the batch size, or resources.actors)"
                    ) from error
                waiting.appendleft(piece)
                idle.append(make_actor())
                continue
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            deaths = 0
            idle.append(actor)
            yield piece, result
