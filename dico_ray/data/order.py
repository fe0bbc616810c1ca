"""The global order of samples: a pure function of (seed, epoch, step), whatever the number of workers.

A data set is cut into *chunks* of consecutive samples (one range read each). Each epoch permutes the chunks;
the samples of all epochs, in that order, form one endless sequence. A *window* is a run of `window_steps`
whole global batches of that sequence, permuted sample by sample (each epoch's part by itself, so that every
epoch holds every sample exactly once, and its partial last batch is filled from the next epoch).
The state of the data is therefore (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CHUNKS, _SAMPLES, _FLIPS = range(3)  # what a draw is for: keeps the generators' keys apart


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key])))


@dataclass(frozen=True)
class SampleOrder:
    """The order in which training sees samples.

    chunk_sizes: samples of each chunk, in the data set's own order (a sample's key is its place there).
    global_batch: samples of one step. window_samples: rounded up to whole global batches.
    """

    chunk_sizes: tuple[int, ...]
    global_batch: int
    window_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not self.chunk_sizes or min(self.chunk_sizes) < 1:
            raise ValueError(f"chunk sizes must be positive and at least one, not {self.chunk_sizes!r}")

    @cached_property
    def chunk_starts(self) -> np.ndarray:
        """Key of each chunk's first sample, and after the last the number of samples: (chunks + 1,)."""
        return np.concatenate([[0], np.cumsum(self.chunk_sizes)])

    def chunk_keys(self, chunk: int) -> np.ndarray:
        """Keys of a chunk's samples, ascending."""
        return np.arange(int(self.chunk_starts[chunk]), int(self.chunk_starts[chunk + 1]))

    @property
    def epoch_samples(self) -> int:
        return int(self.chunk_starts[-1])

    @property
    def window_steps(self) -> int:
        """Steps of one window."""
        return -(-self.window_samples // self.global_batch)

    def window_of(self, step: int) -> int:
        return step // self.window_steps

    def window_keys(self, window: int) -> np.ndarray:
        """Keys of a window's samples in training order: (window_steps * global_batch,) int64.

        Row i belongs to step window * window_steps + i // global_batch.
        """
        return np.concatenate(
            [self._shuffle(part, epoch, window) for epoch, part in self._parts(window)], dtype=np.int64
        )

    def window_flips(self, window: int) -> np.ndarray:
        """Seeded coins, one a row of `window_keys`: (rows,) of 0 (plain) or 1 (mirrored)."""
        rows = self.window_steps * self.global_batch
        return _generator(self.seed, _FLIPS, window).integers(0, 2, rows)

    def _parts(self, window: int) -> list[tuple[int, np.ndarray]]:
        """(epoch, keys in chunk order) for each epoch that the window touches."""
        rows = self.window_steps * self.global_batch
        position, end = window * rows, (window + 1) * rows
        parts = []
        while position < end:
            epoch, offset = divmod(position, self.epoch_samples)
            stop = min(offset + end - position, self.epoch_samples)
            parts.append((epoch, self._unshuffled(epoch, offset, stop)))
            position += stop - offset
        return parts

    def _unshuffled(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Keys at places [start, stop) of the epoch's permuted chunks."""
        chunks = _generator(self.seed, _CHUNKS, epoch).permutation(len(self.chunk_sizes))
        ends = np.cumsum(np.asarray(self.chunk_sizes)[chunks])
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        keys = np.concatenate([self.chunk_keys(int(c)) for c in chunks[first : last + 1]])
        skipped = start - int(ends[first] - self.chunk_sizes[int(chunks[first])])
        return keys[skipped : skipped + stop - start]

    def _shuffle(self, keys: np.ndarray, epoch: int, window: int) -> np.ndarray:
        return _generator(self.seed, _SAMPLES, epoch, window).permutation(keys)

    def chunks_of(self, keys: np.ndarray) -> list[int]:
        """The chunks that hold these samples, each once, ascending."""
        return np.unique(np.searchsorted(self.chunk_starts, keys, side="right") - 1).tolist()


def rank_rows(order: SampleOrder, world_size: int, rank: int) -> np.ndarray:
    """Places in a window's rows that belong to one rank: (window_steps * global_batch / world_size,).

    Rank r of n takes rows [r b, (r + 1) b) of every global batch, b = global_batch / n.
    """
    share = order.global_batch // world_size
    steps = np.arange(order.window_steps)[:, None] * order.global_batch
    return (steps + rank * share + np.arange(share)).ravel()


def chunk_sizes(counts: Sequence[int], chunk_samples: int) -> tuple[int, ...]:
    """Samples of every chunk when shards of `counts` samples are cut into chunks of `chunk_samples`."""
    return tuple(min(chunk_samples, count - start) for count in counts for start in range(0, count, chunk_samples))
