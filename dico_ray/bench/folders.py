"""Where the benches write."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bench_folder(folder: str) -> Iterator[str]:
    """The folder, or a temporary one if it is unset."""
    if folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dico-ray-bench-") as temporary:
        yield temporary
