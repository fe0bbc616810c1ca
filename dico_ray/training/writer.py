"""Writes checkpoints behind training: a copy in memory, then parts, each rank's word, and rank 0's commit marker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dico_ray.storage import Storage, StorageError
from dico_ray.training import attempts
from dico_ray.training.attempts import Attempt
from dico_ray.training.checkpoint import CheckpointError, Retention, commit, folder_name, retain
from dico_ray.training.engine import Engine
from dico_ray.training.evaluations import Evaluations
from dico_ray.training.snapshot import Named, Part, Snapshot

_UPLOADS = 4  # parts at a time
_POLL_S = 0.2


class CheckpointWriter:
    """One rank's. Every rank calls `save` at the same steps; only the copy into memory keeps training waiting.

    A checkpoint whose writing fails (each request is tried for storage.retry_s) is told to `report` and given up;
    after more than `max_failed` in a row the next call raises CheckpointError.
    """

    def __init__(
        self, storage: Storage, attempt: Attempt, engine: Engine, tensors: Callable[[], list[Named]], rule: Retention,
        max_failed: int, report: Callable[[dict[str, Any]], None], patience_s: float,
        thread: ThreadPoolExecutor | None = None, fence: Storage | None = None,
        evaluations: Evaluations | None = None,
    ) -> None:  # fmt: skip
        """storage: the folder of all checkpoints. fence: the one with the attempts, if that is another.

        tensors: what is written, always of the same names and sizes. report: takes events, from a thread.
        patience_s: what rank 0 waits for the other ranks' parts once its own are written. thread: shared by writers
        whose checkpoints have to be committed in the order of their calls. evaluations: told of each checkpoint.
        """
        self._storage, self._attempt, self._rule = storage, attempt, rule
        self._fence, self._evaluations = fence or storage, evaluations
        self._engine, self._tensors = engine, tensors
        self._max_failed, self._report, self._patience_s = max_failed, report, patience_s
        self._failed = 0
        self._snapshot = Snapshot(tensors(), engine.device)
        engine.before_step.append(self._snapshot.hold_device)
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._uploads = ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload")
        self._running: Future[None] | None = None

    def save(self, step: int, about: dict[str, Any]) -> None:
        """Copies the state after `step` steps and begins to write it; waits if the one before is still being written.

        about: JSON facts to keep with it. Raises FencedError, CheckpointError (see above).
        """
        self._settle()
        self._snapshot.take(self._tensors())
        self._running = self._thread.submit(self._write, step, about)

    def poll(self) -> None:
        """Raises FencedError as soon as it is known; costs nothing."""
        if self._running and self._running.done():
            self._settle()

    def finish(self) -> None:
        """Waits until the last checkpoint is committed. Raises CheckpointError if it could not be written."""
        self._settle()
        self._uploads.shutdown()
        if self._failed:
            raise CheckpointError(
                "the last checkpoint could not be written; the same command continues at the one before"
            )

    def _settle(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.result()
            self._failed = 0
        except (StorageError, CheckpointError) as error:
            self._failed += 1
            self._report({"event": "checkpoint failed", "rank": self._engine.rank, "text": str(error)})
            if self._failed > self._max_failed:
                raise CheckpointError(
                    f"{self._failed} checkpoints in a row could not be written (train.max_failed_saves = "
                    f"{self._max_failed}), the last: {error}"
                ) from error

    def _write(self, step: int, about: dict[str, Any]) -> None:
        began = time.monotonic()
        self._snapshot.wait()
        here = self._storage.at(folder_name(step, self._attempt.name))
        rank = f"rank-{self._engine.rank:05d}"
        names = [f"{rank}-part-{i:03d}.safetensors" for i in range(len(self._snapshot.parts))]
        parts = list(self._uploads.map(lambda part, name: _upload(here, part, name), self._snapshot.parts, names))
        here.write(f"{rank}.json", json.dumps(parts).encode())
        if self._engine.rank:
            return
        everyone = self._gather(here)
        attempts.check(self._attempt, attempts.read(self._fence))
        commit(here, step, self._engine.shapes, everyone, about)
        if self._evaluations:
            self._evaluations.committed(folder_name(step, self._attempt.name), step)
        seconds, size = time.monotonic() - began, sum(part["bytes"] for part in everyone)
        self._report({
            "event": "checkpoint", "step": step, "seconds": seconds, "bytes": size, "url": here.url,
            "text": f"step {step} committed after {seconds:.1f} s, {size / 1e9:.2f} GB",
        })  # fmt: skip
        for url in retain(self._storage, self._rule, self._evaluations):
            self._report({"event": "torn checkpoint removed", "url": url, "text": url})

    def _gather(self, here: Storage) -> list[dict[str, Any]]:
        """Every rank's parts, once all have said that theirs are written."""
        due = [f"rank-{rank:05d}.json" for rank in range(self._engine.world_size)]
        until = time.monotonic() + self._patience_s
        while missing := set(due) - set(here.names(".json")):
            if time.monotonic() > until:
                raise CheckpointError(
                    f"{here.url}: {', '.join(sorted(missing))} did not come within {self._patience_s:g} s"
                )
            time.sleep(_POLL_S)
        return [part for name in due for part in json.loads(here.read(name))]


def _upload(here: Storage, part: Part, name: str) -> dict[str, object]:
    here.write(name, memoryview(part.data.numpy()))  # pyright: ignore[reportArgumentType]
    return part.describe(name)
