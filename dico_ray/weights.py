"""Weights in and out: released DiCo files -> a run's checkpoint; a checkpoint -> files and folders that others read.

`dico-ray import` and `dico-ray export`, and how a checkpoint's weights become a network.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dico_ray import __version__, weight_files
from dico_ray.config import Config, ConfigError, Model
from dico_ray.data.latents import Autoencoder
from dico_ray.diffusion.sampler import METHODS
from dico_ray.models import DiCo
from dico_ray.storage import Storage
from dico_ray.training import evaluations
from dico_ray.training.checkpoint import COMMIT, Checkpoint, folder_name, write_whole

if TYPE_CHECKING:
    from dico_ray.pipeline import DiCoPipeline

CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
FORMATS = {"safetensors": (".safetensors",), "released": (".pt", ".pth"), "diffusers": ()}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INDEX = "model_index.json"


def find_checkpoint(config: Config) -> Checkpoint:
    """The checkpoint that sample.checkpoint names. Raises ConfigError if there is none."""
    if config.sample.checkpoint not in ("last", "best"):
        return Checkpoint.open(Storage(config.sample.checkpoint))
    run = Storage(config.run.folder)
    last = Checkpoint.last(run.at(CHECKPOINTS))
    if last is None:
        raise ConfigError(f"run.name: {config.run.folder} has no committed checkpoint; train it, or name another run")
    return last if config.sample.checkpoint == "last" else _best(run, last)


def _best(run: Storage, last: Checkpoint) -> Checkpoint:
    """By the metric that the run was trained with. Raises ConfigError if no checkpoint has it."""
    metric = last.about["config"].get("train", {}).get("best_metric", "loss")
    best = Checkpoint.best(run.at(CHECKPOINTS), metric, evaluations.scores(run.at(evaluations.FOLDER), metric))
    if best is None:
        raise ConfigError(
            f"sample.checkpoint: 'best', but no checkpoint of {run.url} has train.best_metric = {metric}; take 'last'"
        )
    return best


def model_of(checkpoint: Checkpoint) -> Model:
    """The settings of a checkpoint's network."""
    return Model(**checkpoint.about["config"]["model"])


def load_tensors(checkpoint: Checkpoint, config: Config) -> dict[str, Tensor]:
    """The weights that sample.weights names, fp32, by name in the released order. Raises ConfigError if it has none."""
    tensors = checkpoint.tensors("ema" if config.sample.weights == "ema" else "weight")
    return {name: tensors[name] for name in weight_files.shapes(model_of(checkpoint))}


def load_network(checkpoint: Checkpoint, config: Config) -> DiCo:
    """The same as a network, to generate with, in the arithmetic of sample.precision."""
    with torch.device("meta"):  # no time for initial weights that are replaced
        network = DiCo(**weight_files.arguments(model_of(checkpoint)))
    network.load_state_dict(load_tensors(checkpoint, config), assign=True)
    return network.to(_DTYPES[config.sample.precision]).eval().requires_grad_(False)


def check_codec(checkpoint: Checkpoint, vae: Autoencoder) -> None:
    """Raises ConfigError if the training latents came from another autoencoder. What is not known is not checked."""
    trained, given = checkpoint.about["codec"], vae.describe()
    if trained["hash"] and trained["hash"] != given["hash"]:
        raise ConfigError(
            f"codec.vae: {vae.path} is not the autoencoder of the training latents, which came from "
            f"{trained['vae']} (hashes {given['hash']} and {trained['hash']})"
        )


def run_import(config: Config, *, verbose: bool = False, file: str, step: int = 0) -> Checkpoint:
    """`dico-ray import FILE`: writes a committed checkpoint of the file's weights into the run's checkpoints.

    file: a released checkpoint, or one set of weights (.pt or .safetensors), which counts as the EMA weights; path
    or URL. step: optimizer steps behind it. Optimizer states are left out. Raises ConfigError if the file is not to
    be trusted, is not of a DiCo or contradicts the settings, or if the run has such a step or training of its own.
    """
    if step < 0:
        raise ConfigError(f"--step {step}: must be 0 or more")
    run = Storage(config.run.folder)
    _check_room(config, run.at(CHECKPOINTS), step)
    found = weight_files.read(file)
    model = weight_files.detect(found, config.model)
    names = weight_files.shapes(model)
    config = config.model_copy(update={"model": model})
    width = len(str(model.num_classes - 1))
    about = {
        "config": config.model_dump(mode="json"),
        "imported": {"from": found.url, "kinds": sorted(found.weights), "by": f"dico-ray {__version__}"},
        "codec": {"vae": config.codec.vae, "hash": ""},  # a file of weights does not say whose latents it saw
        "classes": [f"{label:0{width}d}" for label in range(model.num_classes)],
    }
    weights = {kind: {name: tensors[name] for name in names} for kind, tensors in found.weights.items()}
    checkpoint = write_whole(run.at(CHECKPOINTS), step, weights, about)
    run.write(CONFIG, config.to_yaml().encode())
    kinds = " and ".join(sorted(weights))
    print(
        f"import: {checkpoint.storage.url}: {weight_files.title(model)}, {kinds} of step {step}; "
        f"{model.num_classes} classes, latents {model.in_channels} x {model.latent_size} x {model.latent_size}\n"
        "import: the optimizer's state is not imported: sample and export take this run, train does not continue it\n"
        f"import: the file does not tell its autoencoder: {config.codec.vae} is assumed, and not checked"
    )
    return checkpoint


def _check_room(config: Config, checkpoints: Storage, step: int) -> None:
    last = Checkpoint.last(checkpoints)
    if last and "imported" not in last.about:
        raise ConfigError(f"run.name: {config.run.name} has checkpoints of its own training; import under another name")
    if checkpoints.at(folder_name(step)).exists(COMMIT):
        raise ConfigError(f"{checkpoints.url} has step {step}; give another --step, or another run.name")


def run_export(config: Config, *, verbose: bool = False, to: str, format: str, dtype: str) -> None:
    """`dico-ray export --to WHERE`: a checkpoint's weights (sample.checkpoint, sample.weights) for other programs.

    to: file or, for diffusers, folder; path or URL. format: one of FORMATS. dtype: fp32 or bf16. Raises ConfigError
    if one of them is impossible, no such weights are there, or codec.vae is not the training's autoencoder.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: take one of {', '.join(FORMATS)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype}: take one of {', '.join(_DTYPES)}")
    suffixes = FORMATS[format]
    if not to or (suffixes and not to.endswith(suffixes)):
        wanted = f"a file ending in {' or '.join(suffixes)}" if suffixes else "a folder"
        raise ConfigError(f"--to {to or '(unset)'}: --format {format} writes {wanted}; name one")
    if format == "diffusers" and config.sample.method not in METHODS:
        raise ConfigError(
            f"sample.method: {config.sample.method}; a pipeline is exported with {' or '.join(METHODS)}, and takes "
            "diffusers' own schedulers by from_config"
        )
    checkpoint = find_checkpoint(config)
    tensors = {name: tensor.to(_DTYPES[dtype]) for name, tensor in load_tensors(checkpoint, config).items()}
    if format == "diffusers":
        _write_pipeline(config, checkpoint, tensors, Storage(to))
    else:
        folder, name = weight_files.split_url(to)
        as_bytes = _released if format == "released" else _safetensors
        folder.write(name, as_bytes(config, checkpoint, tensors))
    print(f"export: {config.sample.weights} weights of {checkpoint.storage.url} as {format} ({dtype}): {to}")


def _released(config: Config, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> bytes:
    """The bare dict of tensors, which `torch.load(..., weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _safetensors(config: Config, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> bytes:
    model = model_of(checkpoint)
    about = {"model": weight_files.title(model), "weights": config.sample.weights, "step": checkpoint.step,
             "latent_size": model.latent_size, "checkpoint": checkpoint.hash,
             "codec": json.dumps(checkpoint.about["codec"])}  # fmt: skip
    return to_safetensors(tensors, {"format": "pt", **{name: str(value) for name, value in about.items()}})


def _write_pipeline(config: Config, checkpoint: Checkpoint, tensors: dict[str, Tensor], target: Storage) -> None:
    from dico_ray.pipeline import PIPELINE_FILE

    if target.names() and not target.exists(_INDEX):
        raise ConfigError(f"--to {target.url}: holds files that are no pipeline; name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        _pipeline(config, checkpoint, tensors).save_pretrained(folder)
        here = Path(folder)
        (here / "pipeline.py").write_text(PIPELINE_FILE)
        (here / "README.md").write_text(_readme(config, checkpoint))
        # The index comes last and goes first: without it nothing loads the folder.
        files = sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file())
        for name in (_INDEX, *sorted({name.split("/")[0] for name in target.names()})):
            target.remove(name)
        for name in sorted(files, key=lambda name: name == _INDEX):
            target.write(name, (here / name).read_bytes())


def _pipeline(config: Config, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> DiCoPipeline:
    """A checkpoint as a pipeline. A local autoencoder is part of it; one by hub id is loaded by who generates."""
    from dico_ray.pipeline import DiCoModel, DiCoPipeline, DiCoScheduler

    model = model_of(checkpoint)
    with torch.device("meta"):
        network: Any = DiCoModel(**weight_files.arguments(model), sample_size=model.latent_size)
    network.load_state_dict(tensors, assign=True)  # in the tensors' dtype
    vae, vae_id = None, config.codec.vae
    if _is_local(config.codec.vae):
        autoencoder = Autoencoder(config.codec.vae, "fp32", torch.device("cpu"))
        check_codec(checkpoint, autoencoder)
        vae, vae_id = autoencoder.network, ""
        vae.register_to_config(_name_or_path="")  # a path of this machine
    scheduler = DiCoScheduler(method=config.sample.method)  # pyright: ignore[reportArgumentType]
    return DiCoPipeline(network.eval(), scheduler, vae, vae_id, checkpoint.about["classes"])


def _is_local(vae: str) -> bool:
    return vae.startswith("/") or Path(vae).is_dir()


def _readme(config: Config, checkpoint: Checkpoint) -> str:
    from dico_ray.pipeline import README

    vae, known = config.codec.vae, checkpoint.about["codec"]["hash"]
    return README.format(
        model=weight_files.title(model_of(checkpoint)),
        weights=config.sample.weights,
        step=checkpoint.step,
        hash=checkpoint.hash,
        vae="in `vae/`" if _is_local(vae) else f"`{vae}`, from the hub when first needed",
        known=f"the training latents' own, hash {known}" if known and _is_local(vae) else "not checked",
        version=__version__,
    )


def load_pipeline(folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiCoPipeline:
    """An exported pipeline folder -> the pipeline; no code in the folder is run.

    Raises ConfigError if there is none, or its network lacks tensors.
    """
    from dico_ray.pipeline import DiCoModel, DiCoPipeline

    if not (Path(folder) / _INDEX).is_file():
        raise ConfigError(f"{folder}: has no {_INDEX}; name a folder that `dico-ray export --format diffusers` wrote")
    network, loaded = cast(Any, DiCoModel).from_pretrained(
        folder, subfolder="unet", low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
    )
    if loaded["missing_keys"]:  # diffusers fills them with random numbers
        raise ConfigError(f"{folder}: the weights lack {sorted(loaded['missing_keys'])[0]}; export it again")
    pipeline = DiCoPipeline.from_pretrained(folder, unet=network, low_cpu_mem_usage=False)
    pipeline = pipeline.to(device) if dtype == torch.float32 else pipeline.to(device, dtype)
    return cast("DiCoPipeline", pipeline)
