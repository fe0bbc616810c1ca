"""A run's numbers and events: JSON lines and TensorBoard in the run's folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from dico_ray.storage import Storage

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
EVALUATED = "evaluation_images"  # by this key a line of metrics is an evaluation's, not a training step's
_TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends metrics to metrics.jsonl and TensorBoard files below `storage`.

    A resumed run passes the step it continues from: what an earlier attempt logged beyond it is dropped, and what it
    left unlogged before it is added, so that the file holds each step once. Object stores cannot append: there the
    files are written anew each time.
    """

    def __init__(self, storage: Storage, start_step: int, unlogged: Sequence[dict[str, Any]] = ()) -> None:
        from tensorboardX import SummaryWriter

        self._storage = storage
        lines = (*unlogged, *_read_lines(storage, METRICS))
        known = {(m["step"], EVALUATED in m): m for m in lines if m["step"] <= start_step}
        self._lines = [json.dumps(known[place]) for place in sorted(known)]
        self._torn = False
        self._write_lines()
        self._board_folder = (
            Path(storage.path(_TENSORBOARD)) if storage.is_local else Path(tempfile.mkdtemp(prefix="tensorboard-"))
        )
        self._board = SummaryWriter(
            str(self._board_folder), purge_step=start_step + 1, filename_suffix=f".{uuid4().hex[:8]}"
        )

    def log(self, metrics: dict[str, Any]) -> None:
        """metrics: plain numbers by name, `step` among them, and perhaps `time`, which TensorBoard keeps by itself.

        Those of an evaluation have EVALUATED too, and their step is past.
        """
        self._lines.append(json.dumps(metrics))
        if self._storage.is_local and not self._torn:
            self._torn = True  # until the line is there: on a full disk a part of it may be
            with open(self._storage.path(METRICS), "a", encoding="utf-8") as file:
                file.write(self._lines[-1] + "\n")
            self._torn = False
        else:
            self._write_lines()
            self._torn = False
        for name, value in metrics.items():
            if name not in ("step", "time"):
                self._board.add_scalar(name, value, metrics["step"])
        self._board.flush()
        self._upload_board()

    def _upload_board(self) -> None:
        if not self._storage.is_local:
            for path in self._board_folder.iterdir():
                self._storage.write(f"{_TENSORBOARD}/{path.name}", path.read_bytes())

    def _write_lines(self) -> None:
        self._storage.write(METRICS, "".join(line + "\n" for line in self._lines).encode())

    def close(self) -> None:
        self._board.close()  # its writer is a thread: only now are all events in the file
        self._upload_board()


class EventLog:
    """What happened to a run, each with its time: appended to events.jsonl, over all its attempts."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lines = [json.dumps(event) for event in read_events(storage)]

    def add(self, event: dict[str, Any]) -> None:
        self._lines.append(json.dumps(event))
        self._storage.write(EVENTS, "".join(line + "\n" for line in self._lines).encode())


def read_events(storage: Storage) -> list[dict[str, Any]]:
    """A run's events, oldest first."""
    return _read_lines(storage, EVENTS)


def read_metrics(storage: Storage) -> list[dict[str, Any]]:
    """What training logged, by step; none if it has not logged. A line cut short by a crash is left out."""
    return [line for line in _read_lines(storage, METRICS) if EVALUATED not in line]


def read_evaluated(storage: Storage) -> list[dict[str, Any]]:
    """What evaluations beside training logged, by the step of their checkpoint."""
    lines = [line for line in _read_lines(storage, METRICS) if EVALUATED in line]
    return sorted(lines, key=lambda line: line["step"])


def _read_lines(storage: Storage, name: str) -> list[dict[str, Any]]:
    if not storage.exists(name):
        return []
    found = []
    for line in storage.read(name).decode().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # only the last one can be torn: lines are appended whole
            break
    return found
