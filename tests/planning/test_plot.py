from __future__ import annotations

from pathlib import Path

import pytest

from dico_ray.config import ConfigError
from dico_ray.planning.plot import check_file, draw
from dico_ray.planning.scaling import grown, ladder
from dico_ray.recipes import resolve


def test_pictures_show_every_number_of_gpus(tmp_path: Path) -> None:
    config = resolve("dico-xl-256", None, {})
    points = ladder(config)
    draw(config, points, grown(config), str(tmp_path / "scaling.svg"))
    draw(config, points, grown(config), str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "scaling.svg").read_text()
    for told in ("DiCo-XL, ZeRO-1: forecast", "global batch 256", "256", "1024", f"{points[0].step_s:.2g} s"):
        assert f"<!-- {told} -->" in drawn


@pytest.mark.parametrize(("file", "says"), [("a.txt", "write .png, .svg or .pdf"), ("missing/a.png", "is no folder")])
def test_files_that_cannot_be_written_are_told_before(file: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        check_file(str(tmp_path / file))
