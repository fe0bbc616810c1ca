"""Checkpoints in two phases: every rank writes its part, then one commit marker makes them count.

    checkpoints/step-00001000/part-00000-of-00002.safetensors   fragments of rank 0: KIND/NAME@START, fp32, 1-D
                              part-00001-of-00002.safetensors
                              commit.json                        what there is, where, with sizes and hashes

Snapshots of the power-function averages lie in averages/ in the same format, with those kinds alone.

The marker is written last and whole. A folder without one is torn, and is never read. Fragments are keyed by
parameter name and flat range, so any world size and ZeRO stage can read any checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dico_ray.config import ConfigError, UserError
from dico_ray.storage import Storage
from dico_ray.training.ema import EMA
from dico_ray.training.engine import KINDS, Engine

FORMAT = "dico-ray-checkpoint/1"
COMMIT = "commit.json"
AVERAGES = "averages"  # the folder of snapshots in a run's


class CheckpointError(UserError, ValueError):
    """A checkpoint that is damaged or does not fit: names the file and says what is wrong."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(storage: Storage, step: int, engine: Engine, ema: EMA, about: dict[str, Any]) -> None:
    """Writes and commits the state after `step` steps. Collective: every rank calls it.

    storage: the folder of all checkpoints. about: JSON facts to keep with it (config, data, codec).
    """
    owned = [f for f in engine.fragments() if f.owned]
    state = {f"{kind}/{f.name}@{f.start}": getattr(f, kind) for f in owned for kind in KINDS}
    _write(storage, step, engine, state | _averages(engine, ema, ema.kinds()), about)


def save_averages(storage: Storage, step: int, engine: Engine, ema: EMA, about: dict[str, Any]) -> None:
    """Writes and commits the averages with a power-function profile alone, for `dico-ray ema`. Collective.

    storage: the folder of all snapshots (averages/ in the run's). about: as for `save`.
    """
    _write(storage, step, engine, _averages(engine, ema, ema.profiles()), about)


def _averages(engine: Engine, ema: EMA, kinds: Iterable[str]) -> dict[str, Tensor]:
    owned = [f for f in engine.fragments() if f.owned]
    return {
        f"{kind}/{fragment.name}@{fragment.start}": average
        for kind in kinds
        for fragment, average in zip(owned, ema.tensors(kind), strict=True)
    }


def _write(storage: Storage, step: int, engine: Engine, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """This rank's tensors, by KIND/NAME@START -> its part; rank 0 commits when all parts stand."""
    here = storage.at(folder_name(step))
    part = f"part-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
    data = to_safetensors({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()})
    here.write(part, data)
    parts = engine.gather(_describe(part, data))
    if engine.rank == 0:
        commit = {"format": FORMAT, "step": step, "shapes": engine.shapes, "parts": parts, "about": about}
        here.write(COMMIT, json.dumps(commit).encode())
    engine.gather(None)  # nobody goes on before the marker stands


def write_whole(
    storage: Storage, step: int, tensors: dict[str, dict[str, Tensor]], about: dict[str, Any]
) -> Checkpoint:
    """Writes and commits whole tensors, by kind and name, from one process: what is imported or averaged later.

    storage: the folder of all checkpoints. All kinds have the same names and shapes; values are stored in fp32.
    """
    here = storage.at(folder_name(step))
    parts = []
    for i, (kind, named) in enumerate(tensors.items()):
        part = f"part-{i:05d}-of-{len(tensors):05d}.safetensors"
        data = to_safetensors({f"{kind}/{n}@0": t.detach().cpu().float().reshape(-1) for n, t in named.items()})
        here.write(part, data)
        parts.append(_describe(part, data))
    shapes = {name: list(tensor.shape) for name, tensor in next(iter(tensors.values())).items()}
    commit = {"format": FORMAT, "step": step, "shapes": shapes, "parts": parts, "about": about}
    here.write(COMMIT, json.dumps(commit).encode())
    return Checkpoint.open(here)


def _describe(part: str, data: bytes) -> dict[str, Any]:
    """A part's entry in the marker: each fragment's kind, name, start, and place and hash of its bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    fragments = []
    for key, entry in json.loads(data[8 : 8 + length]).items():
        kind, rest = key.split("/", 1)
        name, start = rest.rsplit("@", 1)
        at, end = (8 + length + offset for offset in entry["data_offsets"])
        digest = xxhash.xxh3_128_hexdigest(memoryview(data)[at:end])
        fragments.append([kind, name, int(start), at, end, digest])
    return {"file": part, "bytes": len(data), "fragments": fragments}


@dataclass(frozen=True)
class _Piece:
    file: str
    start: int
    stop: int
    at: int
    end: int
    digest: str


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, read by ranges: a reader touches just the fragments it needs."""

    storage: Storage
    commit: dict[str, Any]

    @classmethod
    def open(cls, storage: Storage) -> Checkpoint:
        """Raises ConfigError where no committed checkpoint is, CheckpointError for a damaged marker."""
        try:
            commit = json.loads(storage.read(COMMIT))
        except FileNotFoundError:
            raise ConfigError(
                f"{storage.url} is no committed checkpoint (it has no {COMMIT}); name another, or 'last'"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{storage.url}/{COMMIT} is not JSON: {error}") from None
        if not isinstance(commit, dict) or commit.get("format") != FORMAT:
            raise CheckpointError(f"{storage.url}/{COMMIT}: not in the format {FORMAT!r} that this version reads")
        return cls(storage, commit)

    @classmethod
    def last(cls, storage: Storage) -> Checkpoint | None:
        """The newest committed checkpoint in the folder of all of them, or None."""
        return next(cls._committed(storage, newest_first=True), None)

    @classmethod
    def all(cls, storage: Storage) -> list[Checkpoint]:
        """The committed checkpoints in the folder of all of them, by step."""
        return list(cls._committed(storage))

    @classmethod
    def _committed(cls, storage: Storage, newest_first: bool = False) -> Iterator[Checkpoint]:
        for name in sorted(storage.folders(), reverse=newest_first):
            if name.startswith("step-") and storage.at(name).exists(COMMIT):
                yield cls.open(storage.at(name))

    @property
    def step(self) -> int:
        return self.commit["step"]

    @property
    def about(self) -> dict[str, Any]:
        return self.commit["about"]

    @property
    def hash(self) -> str:
        """Of the marker, and through its hashes of every byte of the checkpoint."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.commit, sort_keys=True).encode())

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list[_Piece]]:
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        for part in self.commit["parts"]:
            for kind, name, start, at, end, digest in part["fragments"]:
                piece = _Piece(part["file"], start, start + (end - at) // 4, at, end, digest)
                pieces.setdefault((kind, name), []).append(piece)
        return pieces

    @property
    def kinds(self) -> list[str]:
        """What it holds of the parameters: weight, exp_avg, exp_avg_sq, ema, ema-0.050, ..."""
        return sorted({kind for kind, _ in self._pieces})

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter: (stop - start,) fp32.

        kind: one of `kinds`. Raises CheckpointError for missing or changed bytes.
        """
        out = torch.empty(stop - start)
        filled = 0
        for piece in self._pieces.get((kind, name), []):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                out[low - start : high - start] = self._fetch(piece)[low - piece.start : high - piece.start]
                filled += high - low
        if filled != stop - start:
            raise CheckpointError(
                f"{self.storage.url}: {kind} of {name} has {filled} of the {stop - start} elements "
                f"in [{start}, {stop}); the checkpoint is of another model (see model.* in its run's config.yaml)"
            )
        return out

    def _fetch(self, piece: _Piece) -> Tensor:
        where = f"{self.storage.url}/{piece.file} at byte {piece.at}"
        try:
            data = self.storage.read(piece.file, piece.at, piece.end)
        except FileNotFoundError:
            raise CheckpointError(f"{where}: the file is gone; take an earlier checkpoint") from None
        if xxhash.xxh3_128_hexdigest(data) != piece.digest:
            raise CheckpointError(f"{where}: the bytes differ from what was committed; take an earlier checkpoint")
        return torch.frombuffer(bytearray(data), dtype=torch.float32)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Every parameter whole, in its shape: kind one of `kinds`."""
        shapes: dict[str, list[int]] = self.commit["shapes"]
        return {
            name: self.read(kind, name, 0, torch.Size(shape).numel()).reshape(shape) for name, shape in shapes.items()
        }

    def check_fits(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises ConfigError if a model's parameters have other names or shapes than the checkpoint's."""
        mine = {name: tuple(shape) for name, shape in self.commit["shapes"].items()}
        if mine != shapes:
            name = sorted(set(mine.items()) ^ set(shapes.items()))[0][0]
            raise ConfigError(
                f"{self.storage.url} is of another model: {name} is {mine.get(name)} there and {shapes.get(name)} "
                "here; set model.* as in its run's config.yaml, or take another run.name"
            )

    def check_has(self, profiles: Iterable[str]) -> None:
        """Raises ConfigError if it lacks one of the power-function averages (kinds) that a run wants to go on with."""
        for kind in profiles:
            if kind not in self.kinds:
                raise ConfigError(
                    f"train.ema_profiles: {self.storage.url} has no average {kind}, which must be kept from the "
                    "first step on; take the width out, or take another run.name"
                )


def restore(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> None:
    """Sets a rank's weights, moments and averages from a checkpoint of any world size and ZeRO stage.

    Raises ConfigError if it is of another model or lacks one of the averages.
    """
    checkpoint.check_fits(engine.shapes)
    checkpoint.check_has(ema.profiles())
    engine.restore(checkpoint.step, checkpoint.read)
    ema.restore(checkpoint.read)


def retain(storage: Storage, keep: int) -> None:
    """Removes all but the newest `keep` committed checkpoints, and torn ones older than the newest."""
    names = [name for name in storage.folders() if name.startswith("step-")]
    committed = [name for name in names if storage.at(name).exists(COMMIT)]
    for name in names:
        if committed and name < committed[-1] and name not in committed[-keep:]:
            _remove(storage, name)


def drop_after(storage: Storage, step: int) -> None:
    """Removes what was written after `step`: a run that is resumed there writes it anew."""
    for name in storage.folders():
        if name.startswith("step-") and name > folder_name(step):
            _remove(storage, name)


def _remove(storage: Storage, name: str) -> None:
    # The marker goes first: a removal that is cut short leaves a torn one, not a damaged one.
    storage.remove(f"{name}/{COMMIT}")
    storage.remove(name)
