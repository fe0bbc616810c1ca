"""Stored images -> batches for an actor: by processes beside it where it has CPUs for that, else by its own threads.

Python's lock bounds what threads of one process decode, however many CPUs they have, and they keep it from the thread
that feeds the GPU. On 16 CPUs, PNG files of 256 pixels: 2,470 images/s by threads, and 1,650 with an eager Inception
on an H100 beside them; 3,460 and 2,480 by processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dico_ray.config import UserError
from dico_ray.data.image_sets import THREADS, ImageSet

_CPUS_OF_A_PROCESS = 2


class ImageReaders:
    """Reads and decodes what an actor judges.

    Args:
        sets: by name.
        cpus: what the actor may use. From 2 on, a process for each 2 of them reads on this node, for which Ray has to
            be connected; it ends with the process that made it.
        room: makes the array, of this shape, into which this process's threads decode a batch; unset: NumPy does.
    """

    def __init__(
        self, sets: Mapping[str, ImageSet], cpus: float, room: Callable[[tuple[int, ...]], np.ndarray] | None = None
    ) -> None:
        self._sets, self._room = sets, room
        count = int(cpus) // _CPUS_OF_A_PROCESS
        self._threads = None if count else ThreadPoolExecutor(max(THREADS, int(cpus)))
        self._processes = cycle(_start(sets, count))

    def batches(self, which: str, cuts: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Images [start, stop) of each cut: uint8 (n, H, W, 3), n > 0. They are read and decoded from now on.

        cuts: each begins where the one before ends. Any thread may call it. The arrays of processes are read-only.
        Raises ImageError for one that cannot be decoded, ConfigError for images of several sizes, RayActorError if a
        process died.
        """
        if self._threads:
            return self._sets[which].batches(cuts, self._threads, self._room)
        found = [next(self._processes).read.remote(which, start, stop) for start, stop in cuts]
        return (_get(reference) for reference in found)


class _Reader:
    def __init__(self, sets: Mapping[str, ImageSet]) -> None:
        self._sets, self._threads = sets, ThreadPoolExecutor(THREADS)

    def read(self, which: str, start: int, stop: int) -> np.ndarray:
        return next(self._sets[which].batches([(start, stop)], self._threads))


def _start(sets: Mapping[str, ImageSet], count: int) -> list[Any]:
    """Processes on this node, which use what Ray reserved for their maker."""
    if not count:
        return []
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(_Reader).options(num_cpus=0, num_gpus=0, scheduling_strategy=here)
    shared = ray.put(sets)
    return [kind.remote(shared) for _ in range(count)]


def _get(reference: Any) -> np.ndarray:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
