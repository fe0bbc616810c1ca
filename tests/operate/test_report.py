from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dico_ray.arithmetic import parameter_count
from dico_ray.config import Config, ConfigError, Model
from dico_ray.evaluate import RESULT
from dico_ray.operate import report
from dico_ray.operate.plots import published
from dico_ray.recipes import resolve
from dico_ray.sample import GRID, RECORD, grid_picture, to_png
from dico_ray.storage import Storage
from dico_ray.train import CONFIG
from dico_ray.training.evaluations import Evaluations, scores_of
from dico_ray.training.telemetry import EVENTS, METRICS

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


_COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
_HEIGHT = 6400  # of the window: the whole page
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def write_progress(config: Config) -> None:
    """What `train` leaves behind when it validates, is evaluated on its way, and meets trouble."""
    run = Storage(config.run.folder)
    results = Evaluations(run, 100, 400)
    lines = [json.loads(line) for line in run.read(METRICS).splitlines()]
    for m in lines:
        m |= {"mfu": 0.31, "step_s": 0.1, "draw_s": 0.005, "forward_s": 0.03, "backward_s": 0.05, "optimizer_s": 0.008,
              "ema_s": 0.002, "goodput": 0.8, "lost_starting_s": 0.0, "lost_redone_s": 30.0, "lost_stalled_s": 10.0,
              "lost_waiting_s": 0.0}  # fmt: skip
        m |= {"val_loss": 0.25 + (400 - m["step"]) / 1e4, "validation_samples": 64} if m["step"] % 100 == 0 else {}
    for (step, distance, count), colour in zip(
        ((100, 40.0, 20), (200, 30.0, 20), (400, 25.0, 50)), _COLOURS, strict=True
    ):
        result = {"frechet_distance": distance, "images": count, "judge": {"images": step / 1000}}
        results.keep(f"step-{step}", step, result, to_png(np.full((20, 40, 3), colour, np.uint8)))
        lines.append({"step": step, **scores_of(result), "evaluation_s": 3.0})
    run.write(METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())
    events = [
        {"time": 100.0, "event": "start", "text": "2 workers begin <after> step 0"},
        {"time": 200.0, "event": "evaluation failed", "text": "step-00000300: no room"},
    ]
    run.write(EVENTS, "".join(json.dumps(event) + "\n" for event in events).encode())


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
    drawings = re.findall("<svg.*?</svg>", html, re.DOTALL)
    for svg in drawings:
        html = html.replace(svg, "")
    assert not re.search("https?://", html)
    names = set(re.findall(r"https?://[^\"'<> ]*", "".join(drawings)))
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


def drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", html, re.DOTALL)]


def curves(drawing: ElementTree.Element, colour: str) -> list[int]:
    """Points of each of a drawing's lines of one colour."""
    lines = [e for e in drawing.iter() if e.tag.endswith("}path") and f"stroke: {colour}" in e.get("style", "")]
    return [e.get("d", "").count("L") + 1 for e in lines if e.get("d", "").count("L") > 2]


def test_the_drawing_is_svg_with_both_curves(config: Config) -> None:
    html, _ = made(config)
    drawing = drawings(html)[0]
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


def test_an_evaluation_that_could_not_tell_all(config: Config) -> None:
    """As with statistics for a reference: no rate of real images, nor how many there were."""
    write_evaluation(config)
    run = Storage(config.run.folder)
    result = json.loads(run.read(RESULT))
    result |= {"fid": 11.25, "label": "FID-1K", "comparable_with_published_fid": True, "reference_images": None}
    result["judge"] |= {"images": 0.5, "reference": None, "by_class": None}
    run.write(RESULT, json.dumps(result).encode())
    _, page = made(config)
    assert "11.25 FID-1K 1001 samples 50.0% samples read as their class 301" in page.text
    assert "an unknown number of images" in page.text
    assert "not comparable" not in page.text


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


def test_the_published_curve_is_beside_the_loss_of_a_row_of_the_family(tmp_path: Path) -> None:
    config = resolve("dico-b-256", None, {"run": {"name": "run-7", "storage": str(tmp_path)}})
    write_run(config)
    html, page = made(config)
    assert "The published curve is the release's own log of DiCo-B" in page.text
    assert curves(drawings(html)[0], "#b3541e") == [6]  # steps 100 to 600: to half as far again as the run came
    for name, count, last in (("S", 101, 0.15242), ("B", 133, 0.14822), ("L", 106, 0.14645), ("XL", 832, 0.14053)):
        row = Model(name=f"DiCo-{name}")
        assert (len(published(row)), published(row)[-1][1]) == (count, last)
        assert published(row)[0][1] > published(row)[-1][1]
    assert not published(Model(name="DiCo-XL", latent_size=64))
    assert not published(Model(name="DiCo-S", hidden_size=64))
    assert not published(Model(name="DiCo-H"))
    other = config_of(tmp_path, run={"name": "other", "storage": str(tmp_path)})
    write_run(other)
    assert "The published curve" not in made(other)[1].text


def test_what_training_told_of_itself(config: Config) -> None:
    write_progress(config)
    html, page = made(config)
    check_self_contained(html, page)
    for said in (
        "0.2500 loss of the EMA weights 64 held-out samples, step 400", "MFU 31.0%",
        "backward 0.0500 s 50%", "other 0.0050 s 5%",
        "steps that stand 80.0%", "steps done again 30.0 s 15.0%", "standing still for checkpoints 10.0 s 5.0%",
        "1970-01-01 00:01:40 start 2 workers begin <after> step 0", "evaluation failed",
        "step images frechet distance judge rate 100 20 40 0.1 200 20 30 0.2 400 50 25 0.4",
        "step 100 step 200 step 400", "the same noise and labels at every step",
    ):  # fmt: skip
        assert said in page.text, said
    loss, scores, telemetry = drawings(html)
    assert curves(loss, "#4b7f52") == [4]  # the held-out loss
    assert "20 images" in ElementTree.tostring(scores).decode() or len(list(scores.iter())) > 10
    assert curves(telemetry, "#1f4e86") == [40] * 5
    pictures = [t.removeprefix("data:image/png;base64,") for t in page.targets if t.startswith("data:")]
    assert [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures] == [(40, 20)] * 3


def test_many_and_wide_grids_are_thinned_and_made_smaller(config: Config) -> None:
    results = Evaluations(Storage(config.run.folder), 1, 400)
    for step in range(1, 31):
        results.keep(f"c{step}", step, None, to_png(np.zeros((30, 2000 if step == 30 else 20, 3), np.uint8)))
    _, page = made(config)
    assert page.tags.count("img") == 8
    assert "step 1 step 5 step 9 step 13 step 18 step 22 step 26 step 30" in page.text
    first, *_, last = (target for target in page.targets if target.startswith("data:"))
    assert first.startswith("data:image/png")
    assert last.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(last.split(",")[1]))).size == (1000, 15)


def test_a_run_that_has_not_logged_has_a_page_of_its_events(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = Storage(config.run.folder)
    run.write(CONFIG, config.to_yaml().encode())
    run.write(EVENTS, b'{"time": 100.0, "event": "failure", "text": "rank 0: no memory"}\n')
    html, page = made(config)
    check_self_contained(html, page)
    assert "no step of 400 has been logged" in page.text
    assert "failure rank 0: no memory" in page.text
    assert "svg" not in page.tags


@pytest.mark.slow
def test_a_browser_shows_it(config: Config, tmp_path: Path) -> None:
    """What Chromium draws, without any network: the curves, the bars, the pictures. The screenshot is kept."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on the PATH ({', '.join(_BROWSERS)}); Debian has it as the package chromium")
    write_progress(config)
    write_samples(config, Storage(config.run.folder).at("samples"))
    write_evaluation(config)
    report.main(config)
    shot = tmp_path / "report.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1100,{_HEIGHT}",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
        f"file://{config.run.folder}/report.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert shot.exists(), done.stderr[-2000:]
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (_HEIGHT, 1100, 3)
    for what, colour, least in (
        ("the loss", (0x1F, 0x4E, 0x86), 300), ("the held-out loss", (0x4B, 0x7F, 0x52), 100),
        ("bars", (0x3A, 0x6E, 0xA5), 2000), *((f"grid {i}", colour, 5000) for i, colour in enumerate(_COLOURS)),
    ):  # fmt: skip
        seen = int((np.abs(pixels.astype(int) - colour).max(-1) < 8).sum())
        assert seen > least, (what, seen)


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
