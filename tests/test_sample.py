"""The sample door: an image is a function of its number, however the work is cut, and nothing is made twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dico_ray import cluster, sample
from dico_ray.config import Config, ConfigError
from dico_ray.data.generated import NPZ, image_set
from dico_ray.models import DiCo
from dico_ray.recipes import resolve
from dico_ray.settings import build
from dico_ray.storage import Storage
from dico_ray.training.checkpoint import write_whole
from dico_ray.weights import CHECKPOINTS, find_checkpoint

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Settings of a run whose one checkpoint has random weights, ten classes and latents (4, 8, 8)."""
    root = tmp_path_factory.mktemp("sample")

    def config(**settings: Any) -> Config:
        own = {"count": 12, "steps": 4, "batch_size": 4, "guidance_scale": 1.5, "grid_rows": 1, **settings}
        sections = {
            "run": {"storage": str(root), "name": "random"},
            "model": {"hidden_size": 8, "depths": [1] * 5},
            "sample": own,
        }
        return resolve("tiny-cpu", None, sections)

    torch.manual_seed(0)
    network = DiCo(8, [1] * 5, 2, 10)
    weights = {name: 0.2 * torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    about = {
        "config": config().model_dump(mode="json"),
        "codec": {"vae": "", "hash": ""},
        "classes": [f"digit-{i}" for i in range(10)],
    }
    write_whole(Storage(str(root / "random")).at(CHECKPOINTS), 7, {"ema": weights}, about)
    return config


def actor(config: Config) -> sample.SampleActor:
    return sample.SampleActor(config, find_checkpoint(config), gpu=False)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "unipc", "dpm++2m-sde", "heun"])
def test_an_image_is_the_same_in_any_batch(make: Make, method: str) -> None:
    whole, labels = actor(make(method=method, batch_size=12, decode_batch=12)).generate(0, 12)
    other = actor(make(method=method, batch_size=3, decode_batch=2))
    parts = [other.generate(*piece) for piece in ((5, 12), (0, 5))]
    assert whole.shape == (12, 32, 32, 3)
    assert whole.dtype == np.uint8
    assert len({image.tobytes() for image in whole}) == 12
    images, others = (np.concatenate([parts[1][k], parts[0][k]]) for k in (0, 1))
    assert np.array_equal(others, labels)
    # Rounding in fp32 becomes one grey level where a value lies at the edge between two.
    difference = np.abs(images.astype(int) - whole)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_bf16_keeps_to_its_own_rounding(make: Make) -> None:
    exact, _ = actor(make(steps=10)).generate(0, 8)
    short, _ = actor(make(steps=10, precision="bf16")).generate(0, 8)
    again, _ = actor(make(steps=10, precision="bf16", batch_size=3)).generate(0, 8)
    assert 0 < np.abs(short.astype(int) - exact).mean() < 5
    assert np.abs(short.astype(int) - again).mean() < 0.5


@pytest.mark.parametrize(
    ("decay", "weights", "says"),
    [
        (0.999, "ema", "99% of the averaged weights at step 7 are still the initial ones (train.ema_decay 0.999)"),
        (0.6, "ema", ""),  # 3%
        (0.999, "model", ""),
    ],
)
def test_averages_that_still_hold_the_initial_weights_are_told(
    make: Make, decay: float, weights: str, says: str
) -> None:
    config = make(weights=weights)
    checkpoint = find_checkpoint(config)
    checkpoint.about["config"]["train"]["ema_decay"] = decay
    told = sample.young_average(config, checkpoint)
    assert told.startswith(says)
    assert bool(told) == bool(says)
    # An average that `dico-ray ema` made has forgotten them, whatever train.ema_decay.
    checkpoint.about["posthoc"] = {"sigma_rel": 0.1}
    assert sample.young_average(config, checkpoint) == ""


def test_a_seed_makes_other_images(make: Make) -> None:
    first, _ = actor(make()).generate(0, 2)
    second, _ = actor(make(seed=1)).generate(0, 2)
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]), ({"classes": [7, 2]}, [7, 2] * 6), ({"labels": "random"}, None),
     ({"labels": "random", "classes": [4, 8, 9]}, None)],
)  # fmt: skip
def test_labels(make: Make, settings: dict[str, Any], expected: list[int] | None) -> None:
    config = make(**settings)
    labels = sample.draw_labels(config.sample, 10, torch.arange(12)).tolist()
    if expected is not None:
        assert labels == expected
        return
    many = sample.draw_labels(config.sample, 10, torch.arange(3000))
    assert many[:12].tolist() == labels
    assert many[500:510].tolist() == sample.draw_labels(config.sample, 10, torch.arange(500, 510)).tolist()
    chosen = config.sample.classes or range(10)
    counts = torch.bincount(many, minlength=10)
    assert counts.sum() == counts[list(chosen)].sum() == 3000
    assert (counts[list(chosen)] - 3000 / len(chosen)).abs().max() < 5 * (3000 / len(chosen)) ** 0.5


@pytest.mark.parametrize("format", ["png", "webdataset", "npz"])
def test_a_piece_is_stored_as_it_is_generated(make: Make, tmp_path: Path, format: str) -> None:
    config = make(format=format, output=str(tmp_path), count=6, piece=6, batch_size=4)
    one = actor(config)
    assert one.work((0, 6)) == 6
    images, labels = one.generate(0, 6)
    stored = image_set(format, Storage(str(tmp_path)), find_checkpoint(config).about["classes"], 6)
    assert stored.held() == [(0, 6)]
    stored.finish(labels.numpy())
    found = stored.read(range(6))
    assert all(np.array_equal(found[i], images[i]) for i in range(6))


def test_settings_that_do_not_fit_the_checkpoint_are_refused(make: Make, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(make())
    with pytest.raises(ConfigError, match=r"sample\.classes: 10 is no label .* 0 to 9"):
        sample.check(make(classes=[3, 10]), checkpoint)
    about = json.loads(json.dumps(checkpoint.about))
    about["config"]["model"]["in_channels"] = 2
    narrow = write_whole(Storage(str(tmp_path)), 1, {"ema": {"w": torch.zeros(1)}}, about)
    with pytest.raises(ConfigError, match=r"latents have 2 channels; set sample\.guidance_channels: all"):
        sample.check(make(guidance_channels="3"), narrow)
    sample.check(make(guidance_channels="all"), narrow)
    sample.check(make(guidance_channels="3", guidance_scale=1.0), narrow)
    with pytest.raises(ConfigError, match=r"sample\.classes: \[1, 1\] names a label twice"):
        make(classes=[1, 1])


def test_files_of_others_are_not_replaced(make: Make, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"sample\.output: .* holds images, which no samples\.json vouches for"):
        sample.main(make(output=str(tmp_path)))
    assert (tmp_path / "images" / "mine.jpg").read_bytes() == b"mine"


def test_the_grid_has_a_column_for_each_drawn_class(make: Make) -> None:
    config = make(classes=[3, 1, 4], grid_rows=2)
    assert sample.grid_indices(config, 10) == [0, 1, 2, 3, 4, 5]
    assert sample.provenance(config, find_checkpoint(config))["grid_classes"] == ["digit-3", "digit-1", "digit-4"]


def test_the_record_tells_what_moves_an_image_and_nothing_else(make: Make) -> None:
    def record(**settings: Any) -> dict[str, Any]:
        config = make(**settings)
        return sample.provenance(config, find_checkpoint(config))

    plain = record()
    for same in ({"batch_size": 7}, {"decode_batch": 1}, {"piece": 3}, {"writers": 1}):
        assert record(**same) == plain
    for other in ({"method": "unipc"}, {"steps": 5}, {"guidance_interval": [1, 500]}, {"classes": [1]}, {"seed": 3},
                  {"guidance_channels": "3"}, {"precision": "bf16"}, {"count": 13}, {"format": "npz"}):  # fmt: skip
        assert record(**other) != plain


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("format", ["png", "webdataset", "npz"])
def test_the_same_command_makes_what_is_missing(
    make: Make, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(format=format, output=str(tmp_path), method="unipc")
    expected, _ = actor(config).generate(0, 12)
    output = Storage(str(tmp_path))
    # As a killed command leaves it: eight images of other settings, or four of these.
    old = make(format="png", output=str(tmp_path), seed=9)
    if format == "npz":
        actor(old).work((0, 8))
        output.write("unfinished.json", json.dumps(sample.provenance(old, find_checkpoint(old))).encode())
        stamps = {}
    else:
        actor(config).work((4, 8))
        output.write("unfinished.json", json.dumps(sample.provenance(config, find_checkpoint(config))).encode())
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.*")}
        assert len(stamps) == (4 if format == "png" else 1)
    sample.main(config)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    names = output.names()
    assert {"grid.png", "samples.json"} < set(names)
    assert "unfinished.json" not in names
    kinds = {"png": (12, ".png"), "webdataset": (3, ".tar"), "npz": (1, NPZ)}
    count, suffix = kinds[format]
    assert len([name for name in names if name.endswith(suffix) and name != "grid.png"]) == count
    assert len(names) == count + 2
    found = image_set(format, output, find_checkpoint(config).about["classes"], 12).read(range(12))
    assert max(np.abs(found[i].astype(int) - expected[i]).max() for i in range(12)) <= 1
    assert Image.open(tmp_path / "grid.png").size == (10 * 34 - 2, 32)
    assert ("4 images are there" in capsys.readouterr().out) == (format != "npz")
    sample.main(config)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize(("settings", "tolerance"), [({}, 1.0), ({"precision": "bf16"}, 8.0)])
def test_a_gpu_makes_the_cpus_images(make: Make, settings: dict[str, Any], tolerance: float) -> None:
    """Mean difference in grey levels; the weights are random, so that images are rough."""
    config = make(steps=10, **settings)
    on_gpu, labels = sample.SampleActor(config, find_checkpoint(config), gpu=True).generate(0, 12)
    expected, same = actor(make(steps=10)).generate(0, 12)
    assert np.array_equal(labels, same)
    assert np.abs(on_gpu.astype(int) - expected).mean() < tolerance


@pytest.mark.gpu
def test_cuda_graphs_make_the_same_images(make: Make) -> None:
    """Bit by bit, guided in an interval, so that two shapes are captured; ragged batches come of whole ones."""
    images = []
    for graphed in (False, True):
        config = make(steps=6, batch_size=8, cuda_graphs=graphed, guidance_scale=1.5, guidance_interval=(200, 800))
        maker = sample.SampleActor(config, find_checkpoint(config), gpu=True)
        images.append(maker.generate(0, 16)[0])
    assert np.array_equal(*images)
    assert np.abs(images[1][8:11].astype(int) - maker.generate(8, 11)[0]).max() <= 1
    graphs = maker.network.inference_graphs
    assert graphs
    assert sorted(recorded.out.shape[0] for recorded in graphs._recorded.values()) == [8, 16]


@pytest.mark.gpu
def test_compiled_networks_make_the_same_images_in_ragged_pieces(make: Make, tmp_path: Path) -> None:
    config = make(compile=True, batch_size=8, decode_batch=5, count=11, piece=11, output=str(tmp_path))
    config = config.model_copy(update={"codec": config.codec.model_copy(update={"compile": True})})
    compiled = sample.SampleActor(config, find_checkpoint(config), gpu=True)
    images, _ = compiled.generate(0, 11)
    again, _ = compiled.generate(6, 11)
    plain, _ = sample.SampleActor(make(), find_checkpoint(config), gpu=True).generate(0, 11)
    assert np.abs(images[6:].astype(int) - again).max() <= 1
    assert np.abs(images.astype(int) - plain).mean() < 1
    assert compiled.work((0, 11)) == 11
    stored = image_set("png", Storage(str(tmp_path)), find_checkpoint(config).about["classes"], 11).read(range(11))
    assert all(np.array_equal(stored[i], images[i]) for i in range(11))


def test_actors_may_share_a_gpu() -> None:
    resources = build({"resources": {"actor_gpus": 0.25, "actor_cpus": 2}}).resources
    assert cluster.actor_options(resources, gpu=True) == {"num_cpus": 2, "num_gpus": 0.25}
    assert cluster.actor_options(resources, gpu=False) == {"num_cpus": 2, "num_gpus": 0}
    with pytest.raises(ConfigError, match=r"resources\.actor_gpus"):
        build({"resources": {"actor_gpus": 1.5}})
