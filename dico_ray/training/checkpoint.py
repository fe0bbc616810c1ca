"""Checkpoints in two phases: every rank writes its parts, then one commit marker makes them count.

    checkpoints/attempts/000001-3f6c09aa.json                           who may commit (attempts.py)
                step-00001000-000001-3f6c09aa/rank-00000-part-000.safetensors   ranges of numbers, KIND/NAME@START
                                              rank-00000.json           rank 0's parts are all there: sizes, hashes
                                              commit.json               every rank's are

The marker is written last and whole. A folder without one is torn, and is never read. Numbers are keyed by
parameter name and flat range, so any world size and ZeRO stage can read any checkpoint. Snapshots of the
power-function averages lie in averages/ in the same format, with those kinds alone.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dico_ray.config import ConfigError, Train, UserError
from dico_ray.storage import Storage
from dico_ray.training import attempts
from dico_ray.training.ema import EMA
from dico_ray.training.engine import Engine
from dico_ray.training.evaluations import Evaluations
from dico_ray.training.snapshot import Named, split_key

FORMAT = "dico-ray-checkpoint/1"
COMMIT = "commit.json"
AVERAGES = "averages"  # the folder of snapshots in a run's
_FOLDER = re.compile(r"step-(\d{8,})(?:-(\d{6}-[0-9a-f]{8}))?")


class CheckpointError(UserError, ValueError):
    """A checkpoint that is damaged or does not fit: names the file and says what is wrong."""


class DamagedError(CheckpointError):
    """A committed checkpoint whose bytes are gone or changed: trying again does not help."""


def folder_name(step: int, attempt: str = "") -> str:
    """attempt: its name; '' for what no run wrote (imported or averaged weights)."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def state(engine: Engine, ema: EMA) -> list[Named]:
    """All that a checkpoint holds of a rank: views of its weights, moments and EMA, in a fixed order."""
    found: list[Named] = []
    owned = [f for f in engine.fragments() if f.owned]
    for i, f in enumerate(owned):
        kinds = {"weight": f.weight, "exp_avg": f.exp_avg, "exp_avg_sq": f.exp_avg_sq}
        kinds |= {kind: ema.tensors(kind)[i] for kind in ema.kinds()}
        found += [(f"{kind}/{f.name}@{f.start}", tensor.detach()) for kind, tensor in kinds.items()]
    return found


def averages(engine: Engine, ema: EMA) -> list[Named]:
    """What a snapshot for `dico-ray ema` holds of a rank: views of its averages with a power-function profile."""
    owned = [f for f in engine.fragments() if f.owned]
    return [
        (f"{kind}/{f.name}@{f.start}", average.detach())
        for kind in ema.profiles()
        for f, average in zip(owned, ema.tensors(kind), strict=True)
    ]


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
    return commit(here, step, shapes, parts, about)


def commit(here: Storage, step: int, shapes: Any, parts: Sequence[dict[str, Any]], about: dict[str, Any]) -> Checkpoint:
    """Writes the marker that makes the parts in the folder `here` count."""
    marker = {"format": FORMAT, "step": step, "shapes": shapes, "parts": list(parts), "about": about}
    here.write(COMMIT, json.dumps(marker).encode())
    return Checkpoint.open(here)


def _describe(part: str, data: bytes) -> dict[str, Any]:
    """A part's entry in the marker: each range's kind, name, start, and place and hash of its bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    fragments = []
    for key, entry in json.loads(data[8 : 8 + length]).items():
        at, end = (8 + length + offset for offset in entry["data_offsets"])
        digest = xxhash.xxh3_128_hexdigest(memoryview(data)[at:end])
        fragments.append([*split_key(key), at, end, digest])
    return {"file": part, "bytes": len(data), "fragments": fragments}


@dataclass(frozen=True, order=True)
class Found:
    """A folder of a checkpoint: its step, its attempt's name, its own name, and whether it has its marker."""

    step: int
    attempt: str
    name: str
    committed: bool


def find(storage: Storage) -> list[Found]:
    """All folders of checkpoints, torn ones and void ones of replaced attempts too, oldest first."""
    matches = [match for name in storage.folders() if (match := _FOLDER.fullmatch(name))]
    return sorted(Found(int(m[1]), m[2] or "", m[0], storage.at(m[0]).exists(COMMIT)) for m in matches)


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
        """The newest committed checkpoint in the folder of all of them that is not void, or None."""
        known = attempts.read(storage)
        for found in reversed(find(storage)):
            if found.committed and not attempts.is_void(found.attempt, found.step, known):
                return cls.open(storage.at(found.name))
        return None

    @classmethod
    def best(cls, storage: Storage, metric: str, evaluated: dict[str, float]) -> Checkpoint | None:
        """The one with the smallest metric, None if no checkpoint has it. evaluated: evaluations', by its name."""
        scores = _scores(storage, _standing(storage, find(storage)), metric, evaluated)
        return cls.open(storage.at(min(scores, key=scores.__getitem__))) if scores else None

    @classmethod
    def all(cls, storage: Storage) -> list[Checkpoint]:
        """The committed checkpoints in the folder of all of them, by step; of two of one step the newer attempt's."""
        return list({f.step: cls.open(storage.at(f.name)) for f in find(storage) if f.committed}.values())

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

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened parameter: (stop - start,) fp32.

        kind: weight, exp_avg, exp_avg_sq or ema. Raises CheckpointError for missing or changed bytes.
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
        data = torch.empty(piece.end - piece.at, dtype=torch.uint8)
        view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
        try:
            count = self.storage.read_into(piece.file, piece.at, view)
        except FileNotFoundError:
            raise DamagedError(f"{where}: the file is gone; take an earlier checkpoint") from None
        if count != len(view) or xxhash.xxh3_128_hexdigest(view) != piece.digest:
            raise DamagedError(f"{where}: the bytes differ from what was committed; take an earlier checkpoint")
        return data.view(torch.float32)

    @property
    def kinds(self) -> list[str]:
        """What it holds of the parameters: weight, exp_avg, exp_avg_sq, ema, ema-0.050, ..."""
        return sorted({kind for kind, _ in self._pieces})

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Every parameter whole, in its shape: kind 'weight' or 'ema'. Raises ConfigError if it holds no such kind."""
        if kind not in self.kinds:
            held = " and ".join(sorted(self.kinds))
            raise ConfigError(f"{self.storage.url} holds no {kind}, only {held}; set sample.weights, or take another")
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


@dataclass(frozen=True)
class Retention:
    """Which committed checkpoints stay: the newest `last`, steps divisible by `every`, the `best` by a metric."""

    last: int
    every: int | None = None
    best: int = 0
    metric: str = "loss"

    @classmethod
    def of(cls, train: Train) -> Retention:
        """As the settings say."""
        return cls(train.keep_checkpoints, train.keep_every, train.keep_best, train.best_metric)

    def keeps(self, committed: Sequence[Found], scores: dict[str, float]) -> set[str]:
        """Names of those that stay. scores: the metric by name, smaller is better."""
        kept = {f.name for f in committed[-self.last :]}
        kept |= {f.name for f in committed if self.every and f.step % self.every == 0}
        return kept | set(sorted(scores, key=scores.__getitem__)[: self.best])


def _standing(storage: Storage, found: Iterable[Found]) -> list[Found]:
    """Those that count: committed, and not void."""
    known = attempts.read(storage)
    return [f for f in found if f.committed and not attempts.is_void(f.attempt, f.step, known)]


def _scores(storage: Storage, good: Iterable[Found], metric: str, evaluated: dict[str, float]) -> dict[str, float]:
    """A metric by checkpoint, of those that have it: an evaluation's, else what training logged."""
    logged = {f.name: Checkpoint.open(storage.at(f.name)).about.get("metrics", {}).get(metric) for f in good}
    scores = {name: evaluated.get(name, value) for name, value in logged.items()}
    return {name: value for name, value in scores.items() if value is not None}


def retain(storage: Storage, rule: Retention, evaluations: Evaluations | None = None) -> list[str]:
    """Removes what the rule does not keep, and older torn or void ones; says what was torn or void.

    evaluations: theirs are metrics too, and a checkpoint that waits for one stays.
    """
    found = find(storage)
    good = _standing(storage, found)
    if not good:
        return []
    evaluated = evaluations.scores(rule.metric) if evaluations and rule.best else {}
    scores = _scores(storage, good, rule.metric, evaluated) if rule.best else {}
    kept = rule.keeps(good, scores) | set(evaluations.due() if evaluations else ())
    lost = []
    for f in found:
        newer = f > good[-1] and f.attempt >= good[-1].attempt  # it may still be under way
        if f.name in kept or (f not in good and newer):
            continue
        lost += [] if f in good else [f"{storage.url}/{f.name}"]
        _remove(storage, f.name)
    return lost


def drop_after(storage: Storage, step: int) -> None:
    """Removes what was written after `step`: a run that is resumed there writes it anew."""
    for found in find(storage):
        if found.step > step:
            _remove(storage, found.name)


def _remove(storage: Storage, name: str) -> None:
    # The marker goes first: a removal that is cut short leaves a torn one, not a damaged one.
    storage.remove(f"{name}/{COMMIT}")
    storage.remove(name)
