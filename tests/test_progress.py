from __future__ import annotations

import time

import pytest

from dico_ray import progress
from dico_ray.progress import Progress


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_plain_lines_come_now_and_then_with_rate_and_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 100, "steps") as shown:
        for done in range(1, 41):
            clock.now += 1
            shown.update(done, "loss 0.31")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train: 15/100 steps, 1.0 steps/s loss 0.31, 85 s left",
        "train: 30/100 steps, 1.0 steps/s loss 0.31, 70 s left",
    ]


def test_the_last_line_comes_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 10, "images") as shown:
        for done in (5, 10, 10, 10):
            clock.now += 1
            shown.update(done)
    assert capsys.readouterr().out.splitlines() == ["encode: 10/10 images, 5.0 images/s"]


def test_a_resumed_run_shows_its_real_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 1000, "steps", already=900) as shown:
        clock.now += 20
        shown.update(910)
    assert capsys.readouterr().out.splitlines() == ["train: 910/1000 steps, 0.5 steps/s, 180 s left"]


def test_no_rate_before_anything_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 10, "steps") as shown:
        clock.now += progress._PLAIN_EVERY_S
        shown.update(0)
    assert capsys.readouterr().out.splitlines() == ["train: 0/10 steps, 0.0 steps/s"]


def test_an_error_inside_gets_out(clock: Clock) -> None:
    with pytest.raises(KeyError), Progress("train", 10, "steps"):
        raise KeyError("x")
