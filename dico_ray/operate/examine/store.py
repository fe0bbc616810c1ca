"""Whether each node may read and write where the run's files go, sees the same ones, and how fast."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import numpy as np
import xxhash

from dico_ray.config import UserError
from dico_ray.data.shards import MANIFEST
from dico_ray.operate.examine.findings import Finding, Verdict, unless
from dico_ray.storage import Storage

PROBES = "doctor"  # the folder in run.storage that the probes are in, for as long as they last
_SLOW_MB_S = (50.0, 10.0)  # below: a warning, bad. One GPU's part of a 1B model's checkpoint in minutes


def probe(run_storage: Storage, latents: Storage, token: str, megabytes: int) -> dict[str, Any]:
    """Writes, lists, reads and removes a file of so many MB, reads the driver's file `token`, and a shard's bytes.

    Each part has a rate in MB/s or, under its name, the error that it ended with.
    """
    found: dict[str, Any] = {}
    folder, name = run_storage.at(PROBES), f"probe-{uuid4().hex}"
    data = np.random.default_rng().bytes(megabytes * 1_000_000)
    with _told(found, "write"):
        began = time.monotonic()
        folder.write(name, data)
        found["write"] = megabytes / (time.monotonic() - began)
    if isinstance(found["write"], float):
        with _told(found, "read"):
            began = time.monotonic()
            back = folder.read(name)
            found["read"] = megabytes / (time.monotonic() - began)
            if xxhash.xxh3_128_digest(back) != xxhash.xxh3_128_digest(data):
                found["read"] = "other bytes came back than were written"
        with _told(found, "list and remove"):
            listed = name in folder.names()
            folder.remove(name)
            gone = not folder.exists(name)
            found["list and remove"] = "" if listed and gone else f"listed: {listed}, gone after removal: {gone}"
    with _told(found, "shared"):
        found["shared"] = "" if folder.read(token).decode() == token else "another file"
    with _told(found, "latents"):
        began = time.monotonic()
        size = len(latents.read(MANIFEST))
        found["latents"] = size / 1e6 / (time.monotonic() - began)
    return found


class _told:
    """`with _told(found, part)`: what the storage refuses becomes the part's text."""

    def __init__(self, found: dict[str, Any], part: str) -> None:
        self._found, self._part = found, part

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, UserError | OSError):
            self._found[self._part] = f"{error}"
            return True
        return False


def judge(probes: Mapping[str, Mapping[str, Any]], run_storage: str, latents: str) -> list[Finding]:
    """By node."""
    found = []
    rights = "see the credentials of this node (environment, secret, workload identity) and storage.options"
    for node, told in probes.items():
        for part in ("write", "read"):
            rate = told.get(part)
            if rate is not None:
                found.append(_rate(f"storage: {part}", node, rate, run_storage, rights))
        for part, mend in (("list and remove", rights),
                           ("shared", "as run.storage name an object store or what all nodes mount")):  # fmt: skip
            text = told.get(part)
            if text is not None:
                shown = text or {"list and remove": "allowed", "shared": "sees what another node wrote"}[part]
                found.append(unless("bad" if text else None, f"storage: {part}", node, shown, mend))
        seen = isinstance(told["latents"], float)
        text = f"reads {latents}" if seen else str(told["latents"])
        mend = "name a data.latents that this node can read: an object store or a folder that all nodes mount"
        found.append(unless(None if seen else "bad", "data set: readable", node, text, mend))
    return found


def _rate(check: str, node: str, rate: float | str, where: str, rights: str) -> Finding:
    if isinstance(rate, str):
        return Finding(check, node, "bad", rate, rights)
    warn, bad = _SLOW_MB_S
    fault: Verdict | None = "bad" if rate < bad else "warning" if rate < warn else None
    return unless(fault, check, node, f"{rate:,.0f} MB/s at {where}", "take a store in the cluster's region, and see "
                  "storage.library and storage.options")  # fmt: skip
