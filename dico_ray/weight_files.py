"""Files of weights that others wrote, read with distrust: released DiCo checkpoints and safetensors.

A pickle can ask for any function of the machine to be called. Only tensors, plain values and the release's
`argparse.Namespace` are let in; a file that asks for more is refused before anything of it runs.
"""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dico_ray.config import ARCHITECTURES, Architecture, ConfigError, Model
from dico_ray.models import DiCo
from dico_ray.settings import build
from dico_ray.storage import Storage

STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
_KINDS = {"model": "weight", "ema": "ema"}  # the release's names -> a checkpoint's
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # each exact in a checkpoint's fp32
_VAE_FACTOR = 8  # pixels to a latent, each way, of the autoencoder that the release trained on
# What PyTorch's restricted unpickler and archive reader raise for files that are damaged, or made to harm.
_BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class WeightFile:
    """What a file holds. weights: by kind ("weight", "ema") and tensor name; latent_size: None where it tells none."""

    url: str
    weights: dict[str, dict[str, Tensor]]
    latent_size: int | None = None


def split_url(url: str) -> tuple[Storage, str]:
    """Path or URL of a file -> its folder, and its name in it."""
    folder, _, name = url.rpartition("/")
    return Storage(folder or ("/" if url.startswith("/") else ".")), name


def read(url: str) -> WeightFile:
    """Reads a file by path or URL; the tensors stay on disk (mapped) until they are used.

    Raises ConfigError, naming the file, if it is absent, damaged, no file of weights, or asks for code to be run.
    """
    folder, name = split_url(url)
    with _on_disk(folder, name) as path:
        return _read_safetensors(path, url) if name.endswith(".safetensors") else _read_pickle(path, url)


@contextmanager
def _on_disk(folder: Storage, name: str) -> Iterator[str]:
    """The file as a local one: a stored one is copied. What is mapped of it outlives its removal."""
    try:
        if folder.is_local:
            with folder.file(name):
                pass
            yield folder.path(name)
            return
        with tempfile.NamedTemporaryFile() as copy:
            with folder.file(name) as file:
                shutil.copyfileobj(file, copy, 2**24)
            copy.flush()
            yield copy.name
    except OSError as error:
        raise ConfigError(
            f"{folder.at(name).url} is not a file that can be read ({error.strerror or 'none is there'}); "
            "name a released checkpoint or a .safetensors file"
        ) from None


def _read_safetensors(path: str, url: str) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{url}: damaged, or no safetensors: {_line(error)}; copy the file again") from None
    size = about.get("latent_size", "")
    return WeightFile(url, {"ema": _checked(tensors, url)}, int(size) if re.fullmatch(r"\d{1,5}", size) else None)


def _read_pickle(path: str, url: str) -> WeightFile:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of pickle protocols
            # The format from before 2020 is no archive, and cannot be mapped.
            found = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _BROKEN as error:
        # The library's own text goes on to advise loading the file without the restriction.
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConfigError(
                f"{url}: refused, and nothing of it was run: its pickle asks for {asked[1]}, but only tensors, plain "
                "values and argparse.Namespace are let in; do not open it, get the weights as .safetensors"
            ) from None
        raise ConfigError(
            f"{url}: refused: damaged, or no PyTorch file of tensors and plain values alone; copy the file again"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{url}: holds {type(found).__name__}, not tensors by name; name a checkpoint of DiCo")
    kinds = {kind: found[name] for name, kind in _KINDS.items() if isinstance(found.get(name), dict)}
    weights = {kind: _checked(tensors, url) for kind, tensors in (kinds or {"ema": found}).items()}
    return WeightFile(url, weights, _latent_size(found.get("args")))


def _latent_size(args: Any) -> int | None:
    """From the image size among the arguments that the release keeps with its weights."""
    size = getattr(args, "image_size", None) if isinstance(args, argparse.Namespace) else None
    return size // _VAE_FACTOR if type(size) is int and size > 0 and size % (4 * _VAE_FACTOR) == 0 else None


def _checked(tensors: dict[Any, Any], url: str) -> dict[str, Tensor]:
    """Raises ConfigError unless these are dense tensors of floating point, by name."""
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigError(
                f"{url}: holds {name!r}: {type(value).__name__}, not a tensor by name; name a checkpoint of DiCo"
            )
        if value.dtype not in _FLOATS or value.layout != torch.strided or value.device.type != "cpu":
            raise ConfigError(
                f"{url}: tensor {name} is {value.dtype}, {value.layout}; weights are dense fp32, bf16 or fp16"
            )
        if value.untyped_storage().nbytes() < value.nbytes:  # one stored number can pose as a terabyte of them
            raise ConfigError(f"{url}: tensor {name} is {tuple(value.shape)}, with fewer numbers stored than that")
    return tensors


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def detect(file: WeightFile, wanted: Model) -> Model:
    """The network that a file's tensors are of, found from their names and shapes.

    wanted: settings; those that were given, rather than left at their defaults, must agree with the file.
    Raises ConfigError naming the first setting that contradicts it, or the first tensor that is missing, has another
    shape, or belongs to no DiCo.
    """
    tensors = next(iter(file.weights.values()))
    sizes = Architecture(
        _side(file, tensors, "x_embedder.proj.weight", 0),
        _depths(tensors),
        max(1, _side(file, tensors, "encoder_level_1.0.conv4.weight", 0)
            // max(1, _side(file, tensors, "encoder_level_1.0.conv4.weight", 1))),
    )  # fmt: skip
    row = next((name for name, row in ARCHITECTURES.items() if row == sizes), None)
    found = {
        "num_classes": _side(file, tensors, "y_embedder.embedding_table_0.weight", 0) - 1,
        "in_channels": _side(file, tensors, "x_embedder.proj.weight", 1),
        "latent_size": file.latent_size or wanted.latent_size,
    }
    _agree(file.url, wanted, sizes, row, found)
    own = {"name": row} if row else {"name": wanted.name, **vars(sizes)}
    try:
        model = build({"model": {**own, **found}}).model
    except ConfigError as error:
        raise ConfigError(f"{file.url}: these are not the weights of a DiCo: {error}") from None
    for named in file.weights.values():
        _check_tensors(file.url, named, shapes(model))
    return model


def _side(file: WeightFile, tensors: dict[str, Tensor], name: str, dimension: int) -> int:
    if name not in tensors:
        raise ConfigError(f"{file.url}: has no tensor {name}: these are not the weights of a DiCo")
    shape = tuple(tensors[name].shape)
    if dimension >= len(shape):
        raise ConfigError(f"{file.url}: tensor {name} is {shape}: these are not the weights of a DiCo")
    return shape[dimension]


def _depths(tensors: dict[str, Tensor]) -> tuple[int, int, int, int, int]:
    a, b, c, d, e = ({n.split(".")[1] for n in tensors if n.startswith(f"{stage}.")} for stage in STAGES)
    return len(a), len(b), len(c), len(d), len(e)


def _agree(url: str, wanted: Model, sizes: Architecture, row: str | None, found: dict[str, int]) -> None:
    given, hint = wanted.model_fields_set, "leave it unset to take the file's, or name another file"
    if given & {"name", "hidden_size", "depths", "ffn_ratio"}:
        for field, value in vars(sizes).items():
            if getattr(wanted.architecture, field) != value:
                raise ConfigError(
                    f"model.{field}: {getattr(wanted.architecture, field)} (model.name {wanted.name}), but {url} has "
                    f"{value}{f' and is {row}' if row else ''}; {hint}"
                )
    for field, value in found.items():
        if field in given and getattr(wanted, field) != value:
            raise ConfigError(f"model.{field}: {getattr(wanted, field)}, but {url} has {value}; {hint}")


def title(model: Model) -> str:
    """The row of the family that the sizes are, or the sizes."""
    sizes = model.architecture
    row = next((name for name, row in ARCHITECTURES.items() if row == sizes), None)
    return row or f"a DiCo of width {sizes.hidden_size}, depths {list(sizes.depths)}, FFN ratio {sizes.ffn_ratio}"


def arguments(model: Model) -> dict[str, Any]:
    """Settings -> the arguments of `DiCo`."""
    sizes = model.architecture
    return {
        "hidden_size": sizes.hidden_size, "depths": sizes.depths, "ffn_ratio": sizes.ffn_ratio,
        "num_classes": model.num_classes, "in_channels": model.in_channels,
    }  # fmt: skip


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by name, in the order of the released checkpoints; nothing is allocated."""
    with torch.device("meta"):
        network = DiCo(**arguments(model))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _check_tensors(url: str, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in tensors:
            raise ConfigError(f"{url}: has no tensor {name}, which the network of its sizes has; copy the file again")
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(f"{url}: tensor {name} is {tuple(tensors[name].shape)}; its network's is {shape}")
    for name in tensors:
        if name not in wanted:
            raise ConfigError(f"{url}: has a tensor {name}, which no DiCo of its sizes has; name another file")
