"""A rank's state, copied out of training's way in the very bytes in which it is stored.

The copy lies in page-locked memory, cut into parts that are complete safetensors files: the headers never change, and
the device writes the numbers straight into their places while training goes on. Only the next optimizer step has to
wait for the copies, and it does so on the device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

PART_BYTES = 127 * 2**20  # of numbers: page-locked memory comes in powers of two, and a header is added

Named = tuple[str, Tensor]
"""KIND/NAME@START, and a flat range of fp32 numbers: element START and what follows it."""


@dataclass(frozen=True)
class Slot:
    """Where a range of numbers lies in a part: kind, parameter, first element, bytes [at, end) of the file."""

    kind: str
    name: str
    start: int
    at: int
    end: int


@dataclass
class Part:
    """One file: its bytes, and what they are."""

    data: Tensor  # (bytes,) uint8
    slots: list[Slot] = field(default_factory=list)

    def describe(self, name: str) -> dict[str, object]:
        """The part's entry in a commit marker: each range's place and the hash of its bytes."""
        view = memoryview(self.data.numpy())  # pyright: ignore[reportArgumentType]
        fragments = [
            [s.kind, s.name, s.start, s.at, s.end, xxhash.xxh3_128_hexdigest(view[s.at : s.end])] for s in self.slots
        ]
        return {"file": name, "bytes": len(view), "fragments": fragments}


class Snapshot:
    """Room for one copy of tensors that keep their names, sizes and order."""

    def __init__(self, tensors: Iterable[Named], device: torch.device, part_bytes: int = PART_BYTES) -> None:
        """tensors: as later given to `take`, fp32 and flat. Takes page-locked memory where training is on a GPU."""
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._copied = torch.cuda.Event() if self._on_gpu else None
        cut = _cut([(key, tensor.numel()) for key, tensor in tensors], part_bytes // 4)
        self.parts = [_part(pieces, self._on_gpu) for pieces in cut]

    @property
    def nbytes(self) -> int:
        return sum(part.data.numel() for part in self.parts)

    @torch.no_grad()
    def take(self, tensors: Iterable[Named]) -> None:
        """Begins to copy the tensors as they are once all work queued so far is done."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            places = self._places()
            for key, tensor in tensors:
                done = 0
                while done < tensor.numel():
                    slot, room = next(places)
                    assert f"{slot.kind}/{slot.name}@{slot.start}" == _key(key, done), f"{key} where {slot} is due"
                    room.copy_(tensor[done : done + room.numel()], non_blocking=True)
                    done += room.numel()
            if self._copied:
                self._copied.record(self._stream)

    def hold_device(self) -> None:
        """What the device does from now on happens after the copies."""
        if self._copied:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Returns once the copies are complete."""
        if self._copied:
            self._copied.synchronize()

    def _places(self) -> Iterator[tuple[Slot, Tensor]]:
        for part in self.parts:
            for slot in part.slots:
                yield slot, part.data[slot.at : slot.end].view(torch.float32)


def split_key(key: str) -> tuple[str, str, int]:
    """KIND/NAME@START -> its three parts."""
    kind, rest = key.split("/", 1)
    name, start = rest.rsplit("@", 1)
    return kind, name, int(start)


def _key(key: str, further: int) -> str:
    kind, name, start = split_key(key)
    return f"{kind}/{name}@{start + further}"


def _cut(sizes: list[tuple[str, int]], most: int) -> Iterator[list[tuple[str, int]]]:
    """Ranges (key, elements) -> lists of ranges of at most `most` elements together, cutting where needed."""
    part: list[tuple[str, int]] = []
    room = most
    for key, count in sizes:
        done = 0
        while done < count:
            size = min(room, count - done)
            part.append((_key(key, done), size))
            done, room = done + size, room - size
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def _part(pieces: list[tuple[str, int]], pinned: bool) -> Part:
    """An empty part with its safetensors header: 8 bytes of length, JSON padded to a multiple of 8, the numbers."""
    entries, offset = {}, 0
    for key, count in pieces:
        entries[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, offset + 4 * count]}
        offset += 4 * count
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    part = Part(torch.empty(start + offset, dtype=torch.uint8, pin_memory=pinned))
    head = len(text).to_bytes(8, "little") + text
    part.data[:start] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for key, entry in entries.items():
        at, end = entry["data_offsets"]
        part.slots.append(Slot(*split_key(key), start + at, start + end))
    return part
