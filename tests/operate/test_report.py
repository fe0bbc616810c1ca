from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config, ConfigError
from dico_ray.evaluate import RESULT
from dico_ray.operate import report
from dico_ray.recipes import resolve
from dico_ray.sample import GRID, RECORD, grid_picture
from dico_ray.storage import Storage
from dico_ray.train import CONFIG
from dico_ray.training.telemetry import METRICS

CLASSES = ["<b>zero</b>", "one", "two"]


def config_of(folder: Path | str, **sections: Any) -> Config:
    sections.setdefault("run", {"name": "run-7", "storage": str(folder)})
    return resolve("tiny-cpu", None, {"train": {"steps": 400}, **sections})


def loss(step: int) -> float:
    """Up and down by turns, so that matplotlib leaves out no point of the curve."""
    return 0.31234 + 0.05 * (step // 10 % 2)


def write_run(config: Config) -> None:
    """What `train` leaves behind."""
    run = Storage(config.run.folder)
    run.write(CONFIG, config.to_yaml().encode())
    lines = [
        {
            "step": step, "loss": loss(step), "mse": loss(step) - 0.1, "vb": 0.1, "grad_norm": 2.0, "lr": 1e-3,
            "images_per_s": 300.0 + step % 3, "data_wait": 0.01, "checkpoint_stall_s": 0.0, "skipped_steps": 0,
            "epoch_images": 96 * step,
        }
        for step in range(10, 401, 10)
    ]  # fmt: skip
    run.write(METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def samples_record(config: Config) -> dict[str, Any]:
    """The fields that `sample` records."""
    return {
        "checkpoint": "c0ffee", "step": 390, "codec": {"vae": "/the/vae", "hash": "beef", "scale": 1.0, "factor": 4},
        "codec_precision": "fp32", "classes": CLASSES,
        **config.sample.model_dump(mode="json", exclude={"checkpoint", "batch_size", "output"}),
        "versions": {"dico_ray": "0.1.0", "torch": "2.9"},
    }  # fmt: skip


def write_samples(config: Config, folder: Storage) -> bytes:
    """What `sample` leaves behind; returns the grid."""
    rng = np.random.default_rng(0)
    cells = {i: rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for i in range(24)}
    grid = grid_picture(config, len(CLASSES), cells)
    folder.write(GRID, grid)
    folder.write(RECORD, json.dumps(samples_record(config)).encode())
    return grid


def write_evaluation(config: Config, judge: bool = True) -> None:
    """What `evaluate` leaves behind."""
    rates = {
        "name": "the judge",
        "images": 0.876,
        "reference": 0.991,
        "by_class": dict(zip(CLASSES, (0.25, 0.5, 0.75), strict=True)),
    }
    result = {
        "frechet_distance": 12.3456, "comparable_with_published_fid": False, "features": "digit features",
        "images": 1001, "reference_images": 5002, "judge": rates if judge else None,
        "provenance": {
            "images": "/i", "samples": None, "image_names": "1", "reference": "/the/reference",
            "reference_names": "2", "features": "fea7", "judge": "3" if judge else None,
            "versions": {"dico_ray": "0.1.0", "torch": "2.9"},
        },
    }  # fmt: skip
    Storage(config.run.folder).write(RESULT, json.dumps(result).encode())


class Page(HTMLParser):
    """The tags, what they point at, and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self._text: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        points = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
        self.targets += [value or "" for name, value in attrs if name in points]

    def handle_data(self, data: str) -> None:
        self._text.append(data)


def made(config: Config) -> tuple[str, Page]:
    report.main(config)
    html = Storage(config.run.folder).read(report.REPORT).decode()
    return html, Page(html)


def check_self_contained(html: str, page: Page) -> None:
    assert all(target.startswith(("data:", "#")) for target in page.targets), page.targets
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))
    # The only addresses are the names of XML vocabularies in the drawing, which nothing fetches.
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert not re.search("https?://", html.replace(svg, ""))
    names = set(re.findall(r"https?://[^\"'<> ]*", svg))
    assert {name.split("/")[2] for name in names} <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = config_of(tmp_path)
    write_run(config)
    return config


def test_a_whole_run(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = Storage(config.run.folder)
    grid = write_samples(config, run.at("samples"))
    write_evaluation(config)
    html, page = made(config)
    assert capsys.readouterr().out == f"report: {run.path('report.html')}\n"
    check_self_contained(html, page)
    assert f"{parameter_count(config.model):,} parameters · step 400 of 400" in page.text
    for said in (
        f"{loss(400):.4f} training loss at step 400", "12.35 Frechet distance", "1001 samples, 5002 real images",
        "87.6% samples read as their class", "99.1% of the real images", "301 images/s", "digit features",
        "the judge", "EMA weights of step 390", "ddpm in 50 steps", "guidance 1.5 on all channels", "c0ffee",
        "/the/vae (hash beef)", "/the/reference (5002 images)", "digit features (hash fea7)", "torch 2.9",
        "one 50%", "two 75%", "not comparable with published FIDs", f"global_batch: {config.train.global_batch}",
    ):  # fmt: skip
        assert said in page.text, said
    images = [target for target in page.targets if target.startswith("data:")]
    assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == [grid]
    assert Image.open(io.BytesIO(grid)).size == (3 * 6 - 2, 8 * 6 - 2)


def test_names_are_text_not_markup(config: Config) -> None:
    write_samples(config, Storage(config.run.folder).at("samples"))
    write_evaluation(config)
    html, page = made(config)
    assert "<b>zero" not in html
    assert "<b>zero</b> 25%" in page.text


def test_the_drawing_is_svg_with_both_curves(config: Config) -> None:
    html, _ = made(config)
    assert html.count("<svg") == 1
    drawing = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    paths = {e.get("d", "").count("L") + 1: e.get("style", "") for e in drawing.iter() if e.tag.endswith("}path")}
    assert "stroke" in paths[40]  # a point for each logged step
    colours = [e.get("style", "") for e in drawing.iter() if e.get("d", "").count("L") == 39]
    assert [re.findall("stroke: (#[0-9a-f]+)", colour) for colour in colours] == [["#b8c7da"], ["#1f4e86"]]


def test_a_run_without_samples_or_evaluation(config: Config) -> None:
    html, page = made(config)
    check_self_contained(html, page)
    assert "training loss at step 400" in page.text
    assert "img" not in page.tags
    assert "Frechet" not in page.text
    assert "None" not in page.text


def test_samples_without_evaluation_and_the_other_way_round(config: Config) -> None:
    run = Storage(config.run.folder)
    write_samples(config, run.at("samples"))
    _, page = made(config)
    assert "img" in page.tags
    assert "Frechet" not in page.text
    run.remove("samples")
    write_evaluation(config)
    _, page = made(config)
    assert "img" not in page.tags
    assert "12.35 Frechet distance" in page.text


def test_an_evaluation_without_a_judge(config: Config) -> None:
    write_samples(config, Storage(config.run.folder).at("samples"))
    write_evaluation(config, judge=False)
    _, page = made(config)
    assert "12.35 Frechet distance" in page.text
    assert "as their class" not in page.text


def test_samples_in_a_folder_of_their_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, sample={"output": str(tmp_path / "elsewhere")})
    write_run(config)
    write_samples(config, Storage(str(tmp_path / "elsewhere")))
    assert "img" in made(config)[1].tags


def test_the_settings_are_those_of_training_not_of_today(config: Config, tmp_path: Path) -> None:
    _, page = made(config_of(tmp_path, train={"steps": 4321}))
    assert "step 400 of 400" in page.text
    assert "steps: 400" in page.text
    assert "4321" not in page.text


def test_one_line_of_metrics_is_enough(config: Config) -> None:
    run = Storage(config.run.folder)
    run.write(METRICS, run.read(METRICS).splitlines(keepends=True)[0])
    html, page = made(config)
    check_self_contained(html, page)
    assert "step 10 of 400" in page.text


def test_the_same_run_gives_the_same_page(config: Config) -> None:
    assert made(config)[0] == made(config)[0]


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1'])
def test_a_run_without_metrics_is_a_wrong_setting(tmp_path: Path, content: bytes | None) -> None:
    config = config_of(tmp_path)
    if content is not None:
        Storage(config.run.folder).write(METRICS, content)
    with pytest.raises(ConfigError, match=r"^run\.name: .*run-7 has no metrics; train it"):
        report.main(config)
    assert not Storage(config.run.folder).exists(report.REPORT)


def test_a_run_in_a_bucket() -> None:
    config = config_of("memory://test-report")
    try:
        write_run(config)
        write_samples(config, Storage(config.run.folder).at("samples"))
        assert "img" in made(config)[1].tags
    finally:
        Storage("memory://test-report").remove("run-7")
