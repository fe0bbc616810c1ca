"""Files of weights: what is read, what is recognised, and what is refused without a byte of it being run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dico_ray import weight_files
from dico_ray.config import ConfigError, Model
from dico_ray.models import create_model
from dico_ray.settings import build
from dico_ray.weight_files import WeightFile, detect, read

GOLDEN = json.loads((Path(__file__).parent / "golden" / "state_dict.json").read_text())


def tiny(seed: int = 0, **overrides: Any) -> dict[str, Tensor]:
    """Random weights of a narrow DiCo-tiny, in the released names."""
    torch.manual_seed(seed)
    model = create_model("DiCo-tiny", **({"hidden_size": 8, "num_classes": 10} | overrides))
    return {name: torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


def released(path: Path, **more: Any) -> str:
    """A file as the released training writes it."""
    args = argparse.Namespace(model="DiCo-tiny", image_size=64, num_classes=1000)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    torch.save({"model": tiny(1), "ema": tiny(2), "opt": optimizer, "args": args} | more, path)
    return str(path)


def model(**settings: Any) -> Model:
    return build({"model": settings}).model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_released_file_is_read_with_its_arguments(tmp_path: Path) -> None:
    found = read(released(tmp_path / "0400000.pt"))
    assert same(found.weights["weight"], tiny(1))
    assert same(found.weights["ema"], tiny(2))
    assert found.latent_size == 8


def test_one_set_of_weights_counts_as_the_ema(tmp_path: Path) -> None:
    torch.save(tiny(3), tmp_path / "ema.pt")
    torch.save(tiny(3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tiny(3), tmp_path / "ema.safetensors", metadata={"latent_size": "16"})
    for name, size in (("ema.pt", None), ("old.pt", None), ("ema.safetensors", 16)):
        found = read(str(tmp_path / name))
        assert list(found.weights) == ["ema"]
        assert same(found.weights["ema"], tiny(3))
        assert found.latent_size == size


def test_a_file_in_an_object_store_is_read(tmp_path: Path) -> None:
    with fsspec.open("memory://weights/0.pt", "wb") as file:
        file.write(Path(released(tmp_path / "0.pt")).read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    assert same(read("memory://weights/0.pt").weights["ema"], tiny(2))


@pytest.mark.parametrize("name", GOLDEN)
def test_each_released_size_is_recognised_by_its_shapes(name: str) -> None:
    tensors = {key: torch.empty(shape, device="meta") for key, shape in GOLDEN[name]["tensors"].items()}
    found = detect(WeightFile("file", {"ema": tensors}, 64), model())
    assert (found.name, found.num_classes, found.in_channels, found.latent_size) == (name, 1000, 4, 64)
    assert {key: list(shape) for key, shape in weight_files.shapes(found).items()} == GOLDEN[name]["tensors"]
    assert weight_files.title(found) == name


def test_sizes_of_ones_own_are_recognised() -> None:
    own = tiny(hidden_size=12, depths=(1, 2, 3, 1, 2), ffn_ratio=3, num_classes=7, in_channels=2)
    found = detect(WeightFile("file", {"ema": own}), model(latent_size=16))
    assert vars(found.architecture) == {"hidden_size": 12, "depths": (1, 2, 3, 1, 2), "ffn_ratio": 3}
    assert (found.num_classes, found.in_channels, found.latent_size) == (7, 2, 16)
    assert "width 12" in weight_files.title(found)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "DiCo-B"}, r"model\.hidden_size: 256 \(model.name DiCo-B\), but f has 8"),
        ({"name": "DiCo-tiny", "hidden_size": 8, "ffn_ratio": 4}, r"model\.ffn_ratio: 4"),
        ({"num_classes": 9}, r"model\.num_classes: 9, but f has 10"),
        ({"in_channels": 16}, r"model\.in_channels: 16, but f has 4"),
        ({"latent_size": 32}, r"model\.latent_size: 32, but f has 8"),
    ],
)
def test_settings_that_contradict_the_file_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        detect(WeightFile("f", {"ema": tiny()}, 8), model(**settings))
    agreeing = model(name="DiCo-tiny", hidden_size=8, num_classes=10, in_channels=4, latent_size=8)
    assert detect(WeightFile("f", {"ema": tiny()}, 8), agreeing) == agreeing.model_copy(
        update={"depths": (2,) * 5, "ffn_ratio": 2}
    )


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tiny().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (_without("x_embedder.proj.weight"), "no tensor x_embedder.proj.weight: these are not the weights of a DiCo"),
        (_without("latent.1.ca.1.bias"), "no tensor latent.1.ca.1.bias"),
        (tiny() | {"latent.0.ca.1.bias": torch.zeros(5)}, r"latent.0.ca.1.bias is \(5,\); its network's is \(32,\)"),
        (tiny() | {"pos_embed": torch.zeros(5)}, "has a tensor pos_embed"),
        (tiny() | {"x_embedder.proj.weight": torch.zeros(())}, r"x_embedder.proj.weight is \(\)"),
        (tiny(learn_sigma=False), r"final_layer.out_proj.weight is \(4, 16, 3, 3\)"),
        ({n: t for n, t in tiny().items() if not n.startswith("latent")}, "every stage needs at least one block"),
    ],
)
def test_the_first_wrong_tensor_is_named(tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        detect(WeightFile("file", {"ema": tensors}), model())
    with pytest.raises(ConfigError, match="file"):
        detect(WeightFile("file", {"weight": tiny(), "ema": tensors}), model())


class Hostile:
    """Pickles as a call: whoever unpickles it makes the call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _hostile(marker: Path) -> dict[str, tuple[Any, str]]:
    command = f"touch {marker}"
    return {
        "os.system": (Hostile(os.system, command), "posix.system"),
        "eval": (Hostile(eval, f"__import__('os').system({command!r})"), "eval"),
        "getattr": (Hostile(getattr, argparse.Namespace, "__init__"), "getattr"),
        "a class of its own": (Hostile(pickle.loads, b"N."), "pickle.loads"),
    }


@pytest.mark.parametrize("kind", _hostile(Path()))
@pytest.mark.parametrize("place", ["args", "ema", "the file", "a bare pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, kind: str, place: str) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "hostile.pt"
    thing, asked = _hostile(marker)[kind]
    if place == "args":
        released(path, args=thing)
    elif place == "ema":
        released(path, ema={**tiny(), "x": thing})
    elif place == "the file":
        torch.save(thing, path)
    else:
        path.write_bytes(pickle.dumps(thing, protocol=2))
    with pytest.raises(ConfigError, match="refused") as refusal:
        read(str(path))
    message = str(refusal.value)
    assert str(path) in message
    assert f"{asked}," in message
    assert "weights_only" not in message  # the library's advice to load it all the same is not passed on
    assert len(message.splitlines()) == 1
    assert not marker.exists()


def test_the_marker_would_have_appeared(tmp_path: Path) -> None:
    """The files above do harm where they are loaded without care: else the test would show nothing."""
    marker, path = tmp_path / "it-ran", tmp_path / "hostile.pt"
    torch.save(_hostile(marker)["os.system"][0], path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        released(path)
    else:
        save_file(tiny(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ConfigError, match=r"damaged, or no .*copy the file again") as refusal:
        read(str(path))
    assert str(path) in str(refusal.value)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    wrong = {
        "list.pt": ([1, 2], "holds list"),
        "text.pt": ({"a": "b"}, "holds 'a': str, not a tensor by name"),
        "numbers.pt": ({1: torch.zeros(1)}, "holds 1: Tensor, not a tensor by name"),
        "ints.pt": ({"a": torch.zeros(1, dtype=torch.int64)}, "a is torch.int64"),
        "doubles.pt": ({"ema": {"a": torch.zeros(1).double()}}, "a is torch.float64"),
        "sparse.pt": ({"a": torch.eye(3).to_sparse()}, "a is torch.float32, torch.sparse_coo"),
        "huge.pt": ({"a": torch.zeros(1).expand(10**12)}, "fewer numbers stored"),
    }
    for name, (thing, says) in wrong.items():
        torch.save(thing, tmp_path / name)
        with pytest.raises(ConfigError, match=says):
            read(str(tmp_path / name))
    (tmp_path / "words.pt").write_text("hello, this is text")
    with pytest.raises(ConfigError, match="refused: damaged"):
        read(str(tmp_path / "words.pt"))
    for missing in (str(tmp_path / "none.pt"), str(tmp_path / "none.safetensors"), str(tmp_path), "memory://no/x.pt"):
        with pytest.raises(ConfigError, match="is not a file"):
            read(missing)
