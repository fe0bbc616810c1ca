"""Attempts: who may commit checkpoints of a run, when an old attempt may still be alive.

Every start of a group of workers claims an attempt, a file in checkpoints/attempts/. Attempts are ordered by number,
ties (two claims at once) by their random part, so all agree which is the newest. One that finds a newer attempt stops
before it commits; and what it committed all the same, beyond the step that the newer one began at, is never read.
No conditional writes are needed, which not every store and library has.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from uuid import uuid4

from dico_ray.config import UserError
from dico_ray.storage import Storage

_FOLDER = "attempts"


class FencedError(UserError):
    """A newer attempt has taken over the run: says who and since when."""


@dataclass(frozen=True, order=True)
class Attempt:
    """name: orders attempts, NUMBER-RANDOM. base: the step it began at, None until that is settled.

    launch: the command that started it, which may start several one after the other.
    """

    name: str
    launch: str = ""
    base: int | None = None
    host: str = ""
    pid: int = 0
    started: float = 0.0

    def told(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"attempt {self.name} of process {self.pid} on {self.host}, since {since}"


def read(storage: Storage) -> list[Attempt]:
    """All attempts, oldest first. storage: the folder of all checkpoints."""
    names = storage.at(_FOLDER).names(".json")
    return sorted(Attempt(**json.loads(storage.at(_FOLDER).read(name))) for name in names)


def claim(storage: Storage, launch: str, previous: Attempt | None) -> Attempt:
    """A new attempt, newer than all there are. previous: this launch's one before, if any.

    Raises FencedError if another launch has claimed one since `previous`: it has taken over.
    """
    found = read(storage)
    if previous:
        check(previous, found)
    number = int(found[-1].name.partition("-")[0]) + 1 if found else 1
    name = f"{number:06d}-{uuid4().hex[:8]}"
    attempt = Attempt(name, launch, None, socket.gethostname(), os.getpid(), time.time())
    _write(storage, attempt)
    return attempt


def settle(storage: Storage, attempt: Attempt, base: int) -> Attempt:
    """Says which step the attempt begins at. From now on older attempts' later commits are void."""
    attempt = Attempt(**{**vars(attempt), "base": base})
    _write(storage, attempt)
    return attempt


def check(mine: Attempt, found: list[Attempt]) -> None:
    """Raises FencedError if there is a newer attempt, of another launch."""
    newest = found[-1]
    if newest.name > mine.name and newest.launch != mine.launch:
        raise FencedError(
            f"another run of the same run.name and run.storage has taken over ({newest.told()}); this one stops. "
            "Stop one of them, or give it another run.name"
        )


def is_void(attempt: str, step: int, found: list[Attempt]) -> bool:
    """Whether a commit of `step` steps by `attempt` came from one that a newer attempt had replaced by then."""
    return any(a.name > attempt and a.base is not None and a.base < step for a in found)


def _write(storage: Storage, attempt: Attempt) -> None:
    storage.at(_FOLDER).write(f"{attempt.name}.json", json.dumps(vars(attempt)).encode())
