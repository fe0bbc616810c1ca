from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dico_ray import settings
from dico_ray.cli import parse
from dico_ray.config import ARCHITECTURES, Config, ConfigError
from dico_ray.settings import SECTION_NAMES, build, fields, merge, nearest


def refused(values: dict[str, Any]) -> str:
    """The one line that explains why these settings cannot work."""
    with pytest.raises(ConfigError) as caught:
        build(values)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "For further information" not in message  # pydantic's own phrasing
    return message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train": {"lrr": 1}}, ["train.lrr", "not a setting", "did you mean train.lr?"]),
        ({"train": {"num_worker": 1}}, ["train.num_worker", "did you mean train.num_workers?"]),
        ({"tarin": {"lr": 1}}, ["tarin", "not a setting"]),
        ({"zzz": 1}, ["zzz", "--help"]),
    ],
)
def test_unknown_keys(values: dict[str, Any], says: list[str]) -> None:
    message = refused(values)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "lr", -1),
        ("train", "lr", "fast"),
        ("train", "lr", float("nan")),
        ("train", "steps", 2.5),
        ("train", "steps", 0),
        ("train", "zero_stage", 4),
        ("train", "label_drop", 1.1),
        ("train", "ema_decay", 1.0),
        ("train", "grad_clip", float("nan")),
        ("train", "precision", "fp16"),
        ("train", "flip", "perhaps"),
        ("run", "name", "a/b"),
        ("run", "name", "two\nlines"),
        ("run", "name", ""),
        ("run", "seed", -1),
        ("model", "latent_size", 10),
        ("model", "depths", [1, 1]),
        ("sample", "steps", 1001),
        ("sample", "method", "euler"),
        ("sample", "guidance_interval", [5, 1000]),
        ("resources", "accelerator", "tpu"),
        ("train", "betas", [0.9, 1.0]),
        ("train", "ema_profiles", [0.05, 0.28]),
        ("train", "ema_snapshot_every", 0),
    ],
)
def test_wrong_values_name_setting_value_and_remedy(section: str, name: str, value: Any) -> None:
    message = refused({section: {name: value}})
    assert message.startswith(f"{section}.{name}")
    assert f"change {section}.{name}" in message
    worst = value[1] if name in ("betas", "guidance_interval", "ema_profiles") else value
    assert repr(worst) in message


@pytest.mark.parametrize("value", [5, None, [1], "x"])
def test_a_section_must_be_a_mapping(value: Any) -> None:
    assert refused({"train": value}).startswith("train: ")


@pytest.mark.parametrize("values", [{1: 2}, {"train": {1: 2}}])
def test_keys_must_be_text(values: dict[Any, Any]) -> None:
    assert "1" in refused(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"train": {"global_batch": 10, "num_workers": 3}},
            ["train.global_batch: 10", "train.num_workers = 3", "1, 2, 5 or 10 workers"],
        ),
        (
            {"train": {"global_batch": 24, "num_workers": 2, "micro_batch": 5}},
            ["train.micro_batch: 5", "12 samples", "take 1, 2, 3, 4, 6 or 12"],
        ),
        ({"train": {"steps": 5, "warmup_steps": 5}}, ["train.warmup_steps: 5", "less than train.steps = 5"]),
        ({"train": {"ema_profiles": [0.1, 0.1]}}, ["train.ema_profiles: 0.1", "give a width once"]),
        ({"train": {"ema_profiles": [0.0505]}}, ["train.ema_profiles: 0.0505", "three decimals"]),
        ({"train": {"ema_snapshot_every": 5}}, ["train.ema_snapshot_every: 5", "needs train.ema_profiles"]),
        ({"train": {"parametrization": "mup"}}, ["train.base_width: unset", "set it to the model.hidden_size"]),
        (
            {"train": {"num_workers": 2}, "resources": {"worker_gpus": 0.5}},
            ["resources.worker_gpus: 0.5", "NCCL", "take 1, or train.num_workers 1"],
        ),
        ({"sample": {"guidance_interval": [9, 1]}}, ["sample.guidance_interval: [9, 1]", "[lowest, highest]"]),
        ({"model": {"name": "DiCo-Q"}}, ["model.name: 'DiCo-Q'", "DiCo-S", "DiCo-tiny"]),
        ({"model": {"name": "two\nlines"}}, ["model.name"]),
        ({"model": {"hidden_size": 7}}, ["model.hidden_size: 7", "even"]),
        ({"model": {"depths": [1, 1, 0, 1, 1]}}, ["model.depths", "at least one block"]),
    ],
)
def test_contradictions_name_the_setting_and_the_remedy(values: dict[str, Any], says: list[str]) -> None:
    message = refused(values)
    assert all(part in message for part in says), message


@given(batch=st.integers(1, 300), workers=st.integers(1, 40), micro=st.integers(1, 40) | st.none())
def test_a_batch_is_taken_exactly_when_it_divides(batch: int, workers: int, micro: int | None) -> None:
    values = {"train": {"global_batch": batch, "num_workers": workers, "micro_batch": micro}}
    divides = batch % workers == 0 and (micro is None or (batch // workers) % micro == 0)
    if divides:
        assert build(values).train.micro_batch == micro
    else:
        assert "does not divide" in refused(values)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("train.lrr", "train.lr"),
        ("sampel.guidance_scale", "sample.guidance_scale"),
        ("guidance_scale", "sample.guidance_scale"),
        ("optimizer.weight_decay", "train.weight_decay"),
    ],
)
def test_nearest_setting(path: str, meant: str) -> None:
    assert nearest(path) == f"; did you mean {meant}?"


def test_nearest_without_anything_near() -> None:
    assert "did you mean" not in nearest("qqqqqqqq.zzzzzzzzz")
    assert "--help" in nearest("qqqqqqqq.zzzzzzzzz")


@pytest.mark.parametrize("section", SECTION_NAMES)
def test_every_setting_is_documented_under_itself(section: str) -> None:
    model = Config.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, settings.Section)
    assert model.__doc__ or section == "resources"
    found = fields(section)
    assert [field.path for field in found] == [f"{section}.{name}" for name in model.model_fields]
    for field in found:
        assert len(field.doc) > 10, field.path
        assert field.doc.endswith((".", ")")), field.path
        assert "\n" not in field.doc, field.path
    docs = [field.doc for field in found]
    assert len(set(docs)) == len(docs)


def test_sections_are_listed_once() -> None:
    assert list(SECTION_NAMES) == [name for name in Config.model_fields if name != "recipe"]


def test_a_field_s_text_is_the_one_below_it() -> None:
    docs = {field.path: field.doc for section in SECTION_NAMES for field in fields(section)}
    assert docs["train.lr"].startswith("Learning rate")
    assert docs["sample.seed"].startswith("Image i is a function")
    assert docs["model.latent_size"].startswith("Height and width of a latent")


def test_resolved_settings_survive_yaml(tmp_path: Path) -> None:
    values = {
        "recipe": "tiny-cpu",
        "run": {"name": "r-1", "storage": "s3://bucket/runs", "seed": 2**63 - 1},
        "model": {"name": "DiCo-B", "hidden_size": 12, "depths": [1, 2, 3, 4, 5]},
        "train": {"lr": 3.0000000000000004e-05, "betas": [0.99, 0.95], "micro_batch": 8, "flip": False},
        "sample": {"guidance_channels": "3", "guidance_interval": [100, 900]},
        "evaluate": {"images": "/tmp/x: y # z"},
    }
    config = build(values)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    again = build(settings.read_yaml(str(file)))
    assert again == config
    assert again.train.lr == 3.0000000000000004e-05
    assert again.model.depths == (1, 2, 3, 4, 5)
    assert set(yaml.safe_load(config.to_yaml())) == {"recipe", *SECTION_NAMES}


def test_defaults_survive_yaml() -> None:
    assert build(yaml.safe_load(Config().to_yaml())) == Config()


def test_yaml_numbers_that_yaml_reads_as_text() -> None:
    assert build(yaml.safe_load("train: {lr: 1e-3}")).train.lr == 1e-3  # YAML 1.1 wants 1.0e-3 for a number


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Config().train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_relative_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = build({"data": {"latents": "x/../latents"}, "evaluate": {"images": "~/images"}, "sample": {"output": ""}})
    assert config.data.latents == str(tmp_path / "latents")
    assert config.evaluate.images == os.path.join(os.path.expanduser("~"), "images")
    assert config.sample.output == ""


@pytest.mark.parametrize("values", [{}, {"run": {"seed": 1}}, {"run": {}}])
def test_default_folders_are_where_the_settings_are_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)  # and not where dico_ray was imported
    assert build(values).run.folder == str(tmp_path / "runs" / "dico")


@pytest.mark.parametrize("url", ["s3://bucket/a/../b", "gs://x", "memory://x/y", "file:///tmp/x"])
def test_urls_stay(url: str) -> None:
    config = build({"data": {"latents": url}, "run": {"storage": url, "name": "r"}, "codec": {"vae": url}})
    assert (config.data.latents, config.codec.vae) == (url, url)
    assert config.run.folder == f"{url}/r"


def test_a_hub_id_stays_and_a_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = "stabilityai/sd-vae-ft-mse"
    assert build({"codec": {"vae": hub}}).codec.vae == hub
    assert build({"codec": {"vae": "./vae"}}).codec.vae == str(tmp_path / "vae")
    assert build({"codec": {"vae": "/a/../b"}}).codec.vae == "/b"
    (tmp_path / "stabilityai" / "sd-vae-ft-mse").mkdir(parents=True)
    assert build({"codec": {"vae": hub}}).codec.vae == str(tmp_path / hub)


def test_own_sizes_take_the_place_of_the_row_s() -> None:
    model = build({"model": {"name": "DiCo-S", "ffn_ratio": 3}}).model
    assert (model.architecture.hidden_size, model.architecture.ffn_ratio) == (128, 3)
    assert model.architecture.depths == ARCHITECTURES["DiCo-S"].depths


def test_merge_is_deep_and_changes_neither() -> None:
    base, over = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": {"z": 1}}
    assert merge(base, over) == {"a": {"x": 1, "y": 3}, "b": 1, "c": {"z": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1}
    assert over == {"a": {"y": 3}, "c": {"z": 1}}
    assert merge({"a": {"x": 1}}, {"a": 5}) == {"a": 5}


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"x: [", "not YAML"), (b"", "must hold"), (b"- 1", "must hold"), (b"\xff\xfe\x00", "not YAML")],
)
def test_bad_files_are_explained(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        settings.read_yaml(str(file))
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_missing_files_are_explained(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name a YAML file that exists"):
        settings.read_yaml(str(tmp_path / name))


def test_keys_in_the_storage_options_are_never_shown() -> None:
    config = build({"storage": {"options": {"secret": "hush"}}})
    assert "hush" not in f"{config!r} {config} {config.to_yaml()} {config.model_dump()}"
    with pytest.raises(ConfigError, match=r"^storage\.options: input should be a valid dictionary") as caught:
        build({"storage": {"options": "secret=hush"}})
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--storage\.options: write a list") as caught:
        parse("train", ["--storage.options", "{secret: hush"])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"best_metric": "fid"}}, r"training logs no fid; set evaluate\.every, or take loss"),
        ({"train": {"best_metric": "val_loss"}}, r"val_loss is known at no checkpoint unless train\.validate_every"),
        ({"train": {"best_metric": "val_loss", "validate_every": 1000, "checkpoint_every": 2500},
          "data": {"validation": "/held-out"}}, r"divides train\.checkpoint_every = 2500"),
    ],
)  # fmt: skip
def test_a_best_metric_that_no_checkpoint_has_is_refused(settings: dict[str, Any], message: str) -> None:
    train = {"keep_best": 1, **settings["train"]}
    with pytest.raises(ConfigError, match=message):
        build({**settings, "train": train})
    build({"train": {"keep_best": 1, "best_metric": "val_loss", "validate_every": 1250, "checkpoint_every": 2500},
           "data": {"validation": "/held-out"}})  # fmt: skip
