"""A worker that hangs tells where, and ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from dico_ray.training.watchdog import Watchdog

STUCK = """
import sys, threading
from pathlib import Path
from dico_ray.training.watchdog import Watchdog

def wait_for_ever_in_a_collective():
    threading.Event().wait()

Watchdog(1.0, Path(sys.argv[1]).write_text)
wait_for_ever_in_a_collective()
"""


def test_a_hang_is_told_with_every_stack_and_ends_the_process(tmp_path: Path) -> None:
    told = tmp_path / "stacks.txt"
    done = subprocess.run([sys.executable, "-c", STUCK, str(told)], timeout=60, check=False)
    assert done.returncode == 1
    assert "no step was finished for" in told.read_text()
    assert "in wait_for_ever_in_a_collective" in told.read_text()
    assert "thread MainThread" in told.read_text()


def test_beats_keep_it_quiet_and_closing_ends_it() -> None:
    told: list[str] = []
    dog = Watchdog(1.0, told.append)
    for _ in range(15):
        time.sleep(0.1)
        dog.beat()
    dog.close()
    time.sleep(1.2)
    assert told == []
