from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _run(marker: str, names: str = "") -> None:
    file = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, "-k", names, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_each_kernel_by_tritons_interpreter() -> None:
    _run("not slow", "float64 and shape1")


@pytest.mark.long
def test_the_kernels_by_tritons_interpreter() -> None:
    _run("not slow")


@pytest.mark.slow
def test_the_operators_in_pytorchs_compiler() -> None:
    _run("slow")
