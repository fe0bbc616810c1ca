from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from dico_ray.config import Config, ConfigError
from dico_ray.recipes import RECIPES, resolve


class Published(NamedTuple):
    """A column of Table 7 (arXiv 2505.11196), written down again from the paper, not from recipes.py."""

    model: str
    latent_size: int
    batch: int
    lr: float
    warmup: int
    betas: tuple[float, float]
    steps: int
    gpus: int


TABLE_7 = {
    "dico-s-256": Published("DiCo-S", 32, 256, 1e-4, 0, (0.9, 0.999), 400_000, 8),
    "dico-b-256": Published("DiCo-B", 32, 256, 1e-4, 0, (0.9, 0.999), 400_000, 8),
    "dico-l-256": Published("DiCo-L", 32, 256, 1e-4, 0, (0.9, 0.999), 400_000, 16),
    "dico-xl-256": Published("DiCo-XL", 32, 256, 1e-4, 0, (0.9, 0.999), 3_750_000, 32),
    "dico-h-256": Published("DiCo-H", 32, 1024, 2e-4, 5_000, (0.99, 0.99), 1_000_000, 64),
    "dico-xl-512": Published("DiCo-XL", 64, 256, 1e-4, 0, (0.9, 0.999), 3_000_000, 64),
}


@pytest.mark.parametrize("name", TABLE_7)
def test_rows_are_the_paper_s(name: str) -> None:
    config, row = resolve(name, None, {}), TABLE_7[name]
    model, train = config.model, config.train
    assert row == Published(
        model.name, model.latent_size, train.global_batch, train.lr, train.warmup_steps, train.betas, train.steps,
        train.num_workers,
    )  # fmt: skip
    assert config.encode.image_size == 8 * row.latent_size
    assert config.recipe == name


@pytest.mark.parametrize("name", TABLE_7)
def test_what_all_published_runs_share(name: str) -> None:
    config = resolve(name, None, {})
    train = config.train
    assert (train.weight_decay, train.ema_decay, train.flip, train.label_drop) == (0.0, 0.9999, True, 0.1)
    assert train.grad_clip == 0
    assert config.codec.vae == "stabilityai/sd-vae-ft-ema"
    assert (config.model.num_classes, config.model.in_channels) == (1000, 4)
    assert (config.model.hidden_size, config.model.depths, config.model.ffn_ratio) == (None, None, None)


def test_all_recipes_are_tested_here() -> None:
    assert set(RECIPES) == {*TABLE_7, "tiny-cpu"}


def test_tiny_cpu_resolves_and_its_files_ship() -> None:
    config = resolve("tiny-cpu", None, {})
    assert config.model.name == "DiCo-tiny"
    assert (config.model.num_classes, config.model.latent_size) == (10, 8)
    assert config.train.global_batch % config.train.num_workers == 0
    assert Path(config.codec.vae).is_dir()
    assert Path(config.evaluate.features).is_file()
    assert Path(config.evaluate.judge).is_file()
    assert config.evaluate.features != config.evaluate.judge


def test_without_a_recipe_the_defaults_stand() -> None:
    assert resolve(None, None, {}) == Config()


def test_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {lr: 3.0e-4, warmup_steps: 7, label_drop: 0.2}\nrun: {seed: 5}\n")
    config = resolve("dico-h-256", str(file), {"train": {"label_drop": 0.3}})
    assert config.train.weight_decay == Config().train.weight_decay  # a default
    assert config.train.global_batch == 1024  # the recipe over the default
    assert config.train.betas == (0.99, 0.99)
    assert (config.train.lr, config.train.warmup_steps, config.run.seed) == (3e-4, 7, 5)  # the file over the recipe
    assert config.train.label_drop == 0.3  # the command line over the file
    assert RECIPES["dico-h-256"]["train"]["lr"] == 2e-4  # the row itself is left alone


def test_the_file_may_name_the_recipe_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: dico-b-256\n")
    assert resolve(None, str(file), {}).model.name == "DiCo-B"
    config = resolve("dico-l-256", str(file), {})
    assert (config.model.name, config.recipe) == ("DiCo-L", "dico-l-256")


def test_a_run_s_own_config_resolves_to_itself(tmp_path: Path) -> None:
    config = resolve("tiny-cpu", None, {"train": {"steps": 77}})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert resolve(None, str(file), {}) == config


def test_unknown_recipes() -> None:
    with pytest.raises(ConfigError, match=r"'dico-xl' is unknown; did you mean dico-xl-(256|512)\?"):
        resolve("dico-xl", None, {})
    with pytest.raises(ConfigError, match=r"take one of dico-s-256, .*tiny-cpu"):
        resolve("zzz", None, {})


@pytest.mark.parametrize("value", ["5", "[a]", "{a: 1}"])
def test_a_recipe_in_a_file_must_be_a_name(tmp_path: Path, value: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe: {value}\n")
    with pytest.raises(ConfigError, match="recipe"):
        resolve(None, str(file), {})
