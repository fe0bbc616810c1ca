"""A pool of Ray actors that takes work from a queue: fast actors do more, dead ones are replaced.

Each piece of work is done by one call and counted once: a piece whose actor died is given out again. Work goes to
actors that are up, so one that finds no room (its node was lost, training holds the GPUs) keeps nothing waiting
while others live. Actors may lie on any nodes, and share GPUs (resources.actor_gpus).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from dico_ray.config import UserError

_MOST_DEATHS_ON_A_PIECE = 5
_MOST_DEATHS_IN_A_ROW = 4  # plus the pool's size: a lost node takes several at once
_START_S = 600.0
_LOOK_S = 5.0

Range = tuple[int, int]


class PoolError(UserError):
    """Actors cannot start, find no room, or died again and again without finishing anything."""


def ranges(count: int, size: int) -> list[Range]:
    """[0, count) cut into (start, stop) of at most `size`."""
    return remaining(count, (), size)


def remaining(count: int, done: Iterable[Range], size: int) -> list[Range]:
    """What of [0, count) no range of `done` covers, cut into (start, stop) of at most `size`."""
    left, at = [], 0
    for start, stop in [*sorted(done), (count, count)]:
        left += [(low, min(low + size, start)) for low in range(at, start, size)]
        at = max(at, stop)
    return left


def run(
    make_actor: Callable[[], Any], size: int, work: Sequence[Any], start_timeout_s: float = _START_S, ahead: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Yields (piece, result) for every piece of `work`, in the order they are finished.

    make_actor: starts an actor with a method `work(piece)`. size: actors at a time. ahead: pieces that wait at an
    actor which is at another one, while there is more work than actors; so it need not wait for the one who asks.
    An exception that the method raises is raised here. Raises PoolError if an actor cannot start, if none finds room
    within start_timeout_s, and after several deaths on one piece, or of actors with no piece finished between.
    Whoever stops early, by an exception or by closing the iterator, leaves no actor behind.
    """
    pool = _Pool(make_actor, size, work, start_timeout_s, ahead)
    try:
        yield from pool.results()
    except BaseException:
        pool.kill()
        raise


def standing(actors: Sequence[Any]) -> Callable[[], Any]:
    """For `run`: actors that are up already, each given out once. It raises PoolError when there is none left."""
    waiting = iter(actors)

    def take() -> Any:
        actor = next(waiting, None)
        if actor is None:
            raise PoolError(
                "an actor died while the pool was timed, so there is no rate; see why it did, and try again"
            )
        return actor

    return take


class _Pool:
    def __init__(
        self, make_actor: Callable[[], Any], size: int, work: Sequence[Any], start_timeout_s: float, ahead: int
    ) -> None:
        self._make_actor, self._size, self._start_timeout_s, self._ahead = make_actor, size, start_timeout_s, ahead
        self._work = list(work)
        self._waiting = deque(range(len(self._work)))
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}  # by what resolves once the actor is up
        self._running: dict[Any, tuple[Any, int]] = {}  # an actor's in the order in which it was given them
        self._dead: set[Any] = set()
        self._deaths_on: Counter[int] = Counter()
        self._deaths = 0
        self._alive_at = time.monotonic()

    def results(self) -> Iterator[tuple[Any, Any]]:
        while self._waiting or self._running:
            while self._waiting and self._idle:
                self._give(self._idle.pop())
            self._give_ahead()
            self._start()
            ready = ray.wait([*self._running, *self._starting], num_returns=1, timeout=_LOOK_S)[0]
            self._check_alive()
            for reference in ready:
                if reference in self._starting:
                    self._started(reference)
                elif (found := self._finished(reference)) is not None:
                    yield found

    def _give(self, actor: Any) -> None:
        number = self._waiting.popleft()
        self._running[actor.work.remote(self._work[number])] = (actor, number)

    def _busy(self) -> Counter[Any]:
        """How many pieces each actor has."""
        return Counter(actor for actor, _ in self._running.values())

    def _give_ahead(self) -> None:
        """The last pieces are left to who is free first."""
        for actor, has in self._busy().items() if self._ahead else ():
            for _ in range(self._ahead + 1 - has):
                if len(self._waiting) > self._size and actor not in self._dead:
                    self._give(actor)

    def kill(self) -> None:
        """Ends every actor, whatever it is at."""
        for actor in [*self._idle, *self._starting.values(), *self._busy()]:
            ray.kill(actor)

    def _start(self) -> None:
        """As many actors as there is work for."""
        have = len(self._idle) + len(self._starting) + len(self._busy().keys() - self._dead)
        for _ in range(min(self._size - have, len(self._waiting) - len(self._starting))):
            actor = self._make_actor()
            self._starting[actor.__ray_ready__.remote()] = actor

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except (RayActorError, OutOfMemoryError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                # Its message is a trace that ends with the reason.
                last = str(error).strip().splitlines()[-1]
                raise PoolError(last.partition("Error: ")[2] or last) from error
            self._died("while it started", error)
            return
        self._idle.append(actor)

    def _finished(self, reference: Any) -> tuple[Any, Any] | None:
        """A piece and its result, or None if its actor died."""
        actor = self._running[reference][0]
        first = next(number for other, number in self._running.values() if other == actor)  # it is at this one
        _, number = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except (RayActorError, ObjectLostError, OutOfMemoryError) as error:  # lost: its node died with the result
            self._waiting.appendleft(number)
            if actor not in self._dead:  # what waited at it is nobody's fault
                self._dead.add(actor)
                ray.kill(actor)  # one that cannot be reached may be alive, and hold what the next one needs
                blamed = number if isinstance(error, RayTaskError) else first  # it told of a process of its own
                self._deaths_on[blamed] += 1
                self._died(f"on {self._work[blamed]}", error, self._deaths_on[blamed])
            return None
        except RayTaskError as error:
            self._free(actor)
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        self._deaths = 0
        self._free(actor)
        return self._work[number], result

    def _free(self, actor: Any) -> None:
        """Is given work, if it has none waiting and has not died since."""
        if actor not in self._dead and not any(other == actor for other, _ in self._running.values()):
            self._idle.append(actor)

    def _died(self, where: str, error: Exception, on_it: int = 0) -> None:
        self._deaths += 1
        why = _why(error)
        hint = "see that one fits into a node's memory (lower the batch size, or resources.actors)"
        if self._deaths >= _MOST_DEATHS_IN_A_ROW + self._size:
            raise PoolError(f"{self._deaths} actors died in a row, the last {where}: {why}; {hint}") from error
        if on_it >= _MOST_DEATHS_ON_A_PIECE:
            raise PoolError(f"{on_it} actors died {where}: {why}; {hint}") from error

    def _check_alive(self) -> None:
        """Raises PoolError if for too long no actor has been up."""
        if self._running or self._idle or not self._starting:
            self._alive_at = time.monotonic()
        elif time.monotonic() - self._alive_at > self._start_timeout_s:
            free = ray.available_resources()
            raise PoolError(
                f"no actor of the pool found room within {self._start_timeout_s:g} s; "
                f"free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs; "
                "lower resources.actor_cpus or resources.actor_gpus, or add nodes"
            )


def _why(error: Exception) -> str:
    """What Ray tells of a death, without the trace or the list of names around it."""
    error = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OutOfMemoryError):  # what follows is advice on Ray's settings
        return " ".join(lines[:2])
    cause = (line for line in lines if line.startswith("The actor is dead because"))
    return next(cause, lines[-1] if lines else type(error).__name__)
