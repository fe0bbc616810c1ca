"""The demo as `make demo` runs it. Where it has run already, its verbs have nothing left to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "demo"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def demo() -> str:
    """What the demo prints, done in the folder that `make demo` uses."""
    command = [sys.executable, "-m", "dico_ray.demo", "--storage", "runs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_prints_the_commands_and_what_it_made(demo: str) -> None:
    for verb in ("encode", "train", "sample", "evaluate", "report"):
        assert f"$ dico-ray {verb} --recipe tiny-cpu" in demo
    for name in ("report.html", "samples/grid.png", "evaluation.json", "metrics.jsonl"):
        assert str(RUN / name) in demo
        assert (RUN / name).is_file()


def test_the_loss_falls(demo: str) -> None:
    """From about 1 (the network predicts zero) to under 0.2, its mean over the last hundred steps."""
    losses = [json.loads(line)["loss"] for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 0.7
    assert np.mean(losses[-10:]) < 0.2


def test_the_samples_are_digits_of_their_class(demo: str) -> None:
    result = json.loads((RUN / "evaluation.json").read_text())
    assert result["images"] == 1000
    assert result["reference_images"] == 5000
    assert result["judge"]["images"] >= 0.8
    assert min(result["judge"]["by_class"].values()) >= 0.6
    assert result["judge"]["reference"] >= 0.97
    assert result["frechet_distance"] < 5.0
    assert result["comparable_with_published_fid"] is False


def test_the_samples_differ_from_each_other_and_from_the_digits(demo: str) -> None:
    made = {p.name: np.asarray(Image.open(p).convert("L"), np.int64) for p in (RUN / "samples/images/3").glob("*.png")}
    assert len({image.tobytes() for image in made.values()}) == 100
    real = np.stack([np.asarray(Image.open(p).convert("L"), np.int64) for p in (ROOT / "runs/digits/3").glob("*.png")])
    nearest = [np.abs(real - image).mean((1, 2)).min() for image in made.values()]
    assert np.median(nearest) > 5  # grey levels, of 255: nobody learned the set by heart
