"""Stored images -> batches for an actor: by processes beside it where it has CPUs for that, else by its own threads.

Python's lock bounds what threads of one process decode, however many CPUs they have, and they keep it from the thread
that feeds the GPU. On 16 CPUs, PNG files of 256 pixels: 2,470 images/s by threads, and 1,650 with an eager Inception
on an H100 beside them; 3,460 and 2,480 by processes (which
then decoded 128 at once).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dico_ray.config import UserError
from dico_ray.data.archives import NpzImages
from dico_ray.data.image_sets import THREADS, ImageSet, new_pixels

_CPUS_OF_A_PROCESS = 2
_READ_AT_ONCE = 32  # images, where they do not lie together in larger pieces
_AHEAD = 2  # that many for each process, of each range that is being read


class ImageReaders:
    """Reads and decodes what an actor judges.

    Args:
        cpus: what the actor may use. From 2 on, a process for each 2 of them reads on this node, for which Ray has to
            be connected; it ends with the process that made it. What needs no decoding, an .npz, is read by threads.
        room: makes the array, of this shape, into which a batch goes; unset: NumPy does.
    """

    def __init__(self, cpus: float, room: Callable[[tuple[int, ...]], np.ndarray] | None = None) -> None:
        self._room = room or new_pixels
        self._threads = ThreadPoolExecutor(max(THREADS, int(cpus)))
        self._count = int(cpus) // _CPUS_OF_A_PROCESS
        self._turn = cycle(_start(self._count))

    def batches(self, source: ImageSet, cuts: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Images [start, stop) of each cut: uint8 (n, H, W, 3), n > 0. They are read and decoded from now on.

        cuts: each begins where the one before ends. Any thread may call it.
        Raises ImageError for one that cannot be decoded, ConfigError for images of several sizes, RayActorError or
        OutOfMemoryError if a process died.
        """
        if not self._count or isinstance(source.source, NpzImages):
            return source.batches(cuts, self._threads, self._room)
        begun = _Chunks(source, cuts[0][0], cuts[-1][1], self._turn, _AHEAD * self._count)
        return self._gather(source, cuts, begun)

    def _gather(self, source: ImageSet, cuts: Sequence[tuple[int, int]], chunks: _Chunks) -> Iterator[np.ndarray]:
        """Batches from chunks, which lie across their bounds."""
        rest, done = np.empty((0, 0, 0, 3), np.uint8), cuts[0][0]
        size: tuple[int, ...] | None = None
        try:
            for start, stop in cuts:
                place: np.ndarray | None = None
                while done < stop:
                    rest = rest if len(rest) else chunks.next()
                    size = size or rest.shape[1:]
                    if rest.shape[1:] != size:  # that of another chunk: threads find, and tell, which images these are
                        list(source.batches([(cuts[0][0], done + 1)], self._threads))
                    place = self._room((stop - start, *size)) if place is None else place
                    some = min(len(rest), stop - done)
                    place[done - start : done - start + some] = rest[:some]
                    rest, done = rest[some:], done + some
                assert place is not None
                yield place
        finally:
            chunks.leave()


class _Chunks:
    """Images [start, stop) of a set, in order, as processes have decoded them; some are read ahead."""

    def __init__(self, source: ImageSet, start: int, stop: int, turn: Iterator[Any], ahead: int) -> None:
        self._left = deque(source.chunks(start, stop, _READ_AT_ONCE))
        self._turn, self._ahead = turn, ahead
        self._asked: deque[Any] = deque()
        self._ask()

    def _ask(self) -> None:
        while self._left and len(self._asked) < self._ahead:
            self._asked.append(next(self._turn).read.remote(*self._left.popleft()))

    def next(self) -> np.ndarray:
        try:
            return ray.get(self._asked.popleft())
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        finally:
            self._ask()

    def leave(self) -> None:
        """What is not begun stays undone."""
        for reference in self._asked:
            ray.cancel(reference)
        self._left.clear()
        self._asked.clear()


class _Reader:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS)

    def read(self, part: ImageSet, start: int, stop: int) -> np.ndarray:
        return next(part.batches([(start, stop)], self._threads))


def _start(count: int) -> list[Any]:
    """Processes on this node, which use what Ray reserved for their maker."""
    if not count:
        return []
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(_Reader).options(num_cpus=0, num_gpus=0, max_concurrency=2, scheduling_strategy=here)
    return [kind.remote() for _ in range(count)]
