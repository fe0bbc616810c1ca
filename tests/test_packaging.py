"""What the project promises about itself: the README's map, the jobs, the weights it ships."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readmes_map_names_every_module() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    dico_ray/\n") : text.index("    jobs/")]
    for path in (ROOT / "dico_ray").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "demo":
            assert re.search(rf"\b{path.stem}\b", tree), f"{path.relative_to(ROOT)} is not on the README's map"


def test_shipped_weights_are_small_and_safetensors_only() -> None:
    files = [p for p in (ROOT / "dico_ray" / "demo" / "weights").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 3_000_000
    assert {p.suffix for p in files} == {".safetensors", ".json"}


def test_every_room_has_tests() -> None:
    for path in (ROOT / "dico_ray").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert list((ROOT / "tests" / path.name).glob("test_*.py")), f"no tests of {path.name}/"
