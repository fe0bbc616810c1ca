"""`dico-ray VERB`: settings from a recipe, a YAML file and the command line, then the verb's door.

Nothing heavy is imported until the settings have been found good: help and a mistyped key answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import yaml

from dico_ray import job, storage
from dico_ray.config import Config, ConfigError, UserError
from dico_ray.recipes import RECIPES, resolve
from dico_ray.settings import SECTION_NAMES, Setting, fields, nearest


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip("[]()").split(",")]


def _integers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


class Option(NamedTuple):
    """An argument of one verb alone, handed to its door by name: a flag (--name VALUE), or what stands alone."""

    name: str
    kind: Callable[[str], Any]
    default: Any  # None: it must be given
    doc: str
    values: int | None = None  # None: one value, else a list of so many


class Verb(NamedTuple):
    module: str  # its function `main`, or MODULE:FUNCTION
    summary: str
    sections: tuple[str, ...]
    options: tuple[Option, ...] = ()


_BENCH_DATA = (
    Option("--samples", int, 65536, "synthetic samples"),
    Option("--folder", str, "", "folder or URL for the synthetic shards, kept and used again; unset: a temporary one"),
    Option("--rivals", _boolean, True, "also time the readers that it is compared with"),
    Option("--json", str, "", "file for the figures"),
)
_BENCH_EVALUATE = (
    Option("--images", int, 1000, "random images"),
    Option("--size", int, 256, "their height and width"),
    Option("--random", _boolean, False, "an untrained Inception, as fast as the published one, which is not at hand"),
    Option("--rival", _boolean, True, "also time torch-fidelity's own pass over the same files"),
    Option("--ways", _words, "all", "all, none, or fp32 and some of: tf32, fp16, tf32 compiled, fp16 compiled"),
    Option("--actors", _integers, "0", "sizes of pools on a cluster to compare, as [1,2,4]; 0: none"),
    Option("--folder", str, "", "folder or URL that all nodes reach, for the images; unset: a temporary one"),
    Option("--json", str, "", "file for the figures"),
)
_BENCH_SAMPLE = (
    Option("--images", int, 64, "images that each measurement generates on an actor"),
    Option("--timed_steps", int, 0, "steps timed for the network's phase and the released way, for all; 0: all"),
    Option("--evaluate", _boolean, True, "also time generation with features and statistics, as evaluate runs it"),
    Option("--weights", str, "random", "random (speed does not depend on values), or run (its checkpoint, codec.vae)"),
    Option("--vae", str, "random", "beside random weights: random (of Stable Diffusion's sizes), or codec (codec.vae)"),
    Option("--actors", _integers, "1", "sizes of the pools to compare, as [1,2,4]"),
    Option("--folder", str, "", "folder or URL that all nodes reach, for what is written; unset: a temporary one"),
    Option("--json", str, "", "file for the figures"),
)
_BENCH_ENCODE = (
    Option("--images", int, 256, "images that each row encodes"),
    Option("--ways", _words, "all", "rows besides the released way, as [bf16,fp16 compiled]"),
    Option("--vae", str, "random", "random (of Stable Diffusion's sizes), or codec (codec.vae)"),
    Option("--folder", str, "", "folder or URL for the random autoencoder; unset: a temporary one"),
    Option("--json", str, "", "file for the figures"),
)
_BENCH_KERNELS = (
    Option("--micro_batches", _integers, "64", "images at a time; each is measured, as [32,64,96]"),
    Option("--seconds", float, 5.0, "seconds for which each is timed, at least"),
    Option("--json", str, "", "file for the figures"),
)
_BENCH_NETWORK = (
    Option(
        "--variants",
        _words,
        "released,eager,compiled,fused,rival",
        "ways to run the network; graphed and engine are two more",
    ),
    *_BENCH_KERNELS,
)
_BENCH_SCALING = (
    Option("--workers", _integers, "1,2", "numbers of workers, as [1,2,4]"),
    Option("--stages", _integers, "1,2,3", "ZeRO stages"),
    Option("--micro_batches", _integers, "64", "images that a worker computes at a time; each is measured"),
    Option("--steps", int, 3, "optimizer steps that each is timed for"),
    Option("--json", str, "", "file for the figures"),
)
_CONVERT = (
    Option("source", str, None, "folder or URL to read"),
    Option("target", str, None, "folder or URL to write"),
    Option("--kind", str, "dit", "dit (a .npy file an image), lightning (safetensors), or plain (from our shards)"),
    Option("--scale", float, 1.0, "factor on the values, where they are stored unscaled"),
)
_IMPORT = (
    Option("file", str, None, "file or URL: a released DiCo checkpoint, or one set of weights (.pt, .safetensors)"),
    Option("--step", int, 0, "optimizer steps that the weights have behind them"),
)
_EXPORT = (
    Option("--to", str, "", "file (.safetensors; .pt for released) or, for diffusers, folder; path or URL"),
    Option("--format", str, "safetensors", "safetensors, released (a torch file of tensors by name), or diffusers"),
    Option("--dtype", str, "fp32", "numbers of the exported weights: fp32 or bf16"),
)
_EMA = (
    Option("--sigma", float, None, "relative width of the average, in (0, 0.28), with up to three decimals"),
    Option("--step", int, 0, "optimizer step of the average; 0: the last snapshot's"),
)
_PLAN = (
    Option("--plot", str, "", "PNG, SVG or PDF file for a picture of the scaling forecast"),
    Option("--json", str, "", "file for the figures"),
)
_RENDER = (
    Option("--kind", str, "job", "job (a RayJob of one verb), cluster (a RayCluster that stays), cron (evaluations)"),
    Option("--verb", str, "train", "the job's verb: encode, train, sample or evaluate"),
    Option("--output", str, "", "file for the manifests; unset: the terminal"),
    Option("--check", str, "", "file of manifests to check instead, by KubeRay's schemas and its controller's rules"),
    Option("--crds", str, "", "KubeRay's schemas: a folder, URL or release (v1.6.0); unset: kubectl's cluster"),
)
_EVALUATE = (Option("--compare", str, (), "two results (.json): says in what choices and numbers they differ", 2),)
_DOCTOR = (
    Option("--json", str, "", "file for the findings"),
    Option("--megabytes", int, 64, "size of the file that each node writes to the storage and reads back"),
    Option("--chunks", int, 16, "chunks of the data set that are read and checked"),
    Option("--timeout", float, 120.0, "seconds that one examination may take"),
)
_STATUS = (Option("--watch", float, 0.0, "seconds between looks, until Ctrl-C or the run's end; 0: look once"),)
_THREADS = Option("--threads", int, 8, "shards or chunks read at a time")
_URL = Option("url", str, None, "folder or URL of the shards")
VERBS: dict[str, Verb] = {
    "encode": Verb("encode", "images -> latent shards",
                   ("codec", "data", "encode", "storage", "resources")),
    "train": Verb("train", "latent shards -> checkpoints with EMA weights (the same command resumes)",
                  ("run", "model", "data", "train", "storage", "resources")),
    "ema": Verb("average", "snapshots of a run's averages -> the average of any other width, as a checkpoint",
                ("run", "storage"), _EMA),
    "sample": Verb("sample", "a checkpoint -> images, on a pool of actors",
                   ("run", "codec", "sample", "storage", "resources")),
    "evaluate": Verb("evaluate", "images, or a checkpoint -> FID, sFID, IS, precision, recall, on a pool of actors",
                     ("run", "codec", "sample", "evaluate", "storage", "resources"), _EVALUATE),
    "sweep": Verb("sweep", "learning rates x scales -> the best run, and how loss scales (Ray Tune around train)",
                  ("run", "model", "data", "train", "sweep", "storage", "resources")),
    "import": Verb("weights:run_import", "released DiCo weights -> a run's checkpoint, to sample from",
                   ("run", "model", "codec", "storage"), _IMPORT),
    "export": Verb("weights:run_export", "a checkpoint's weights -> safetensors, a torch file, a diffusers pipeline",
                   ("run", "codec", "sample", "storage"), _EXPORT),
    "plan": Verb("operate.plan", "memory, largest micro-batch, speed, hours, traffic, scaling, before anything starts",
                 ("run", "model", "data", "encode", "train", "hardware"), _PLAN),
    "render": Verb("operate.render", "Kubernetes manifests of a run (KubeRay), and the check of manifests",
                   ("run", "data", "train", "evaluate", "resources", "cluster"), _RENDER),
    "doctor": Verb("operate.doctor", "a live cluster, storage and data set, examined before GPUs are spent on them",
                   ("run", "model", "data", "train", "storage", "resources"), _DOCTOR),
    "status": Verb("operate.status", "a run's progress, rate, loss, goodput, last checkpoint, time left",
                   ("run", "storage"), _STATUS),
    "report": Verb("operate.report", "a run -> one HTML file: loss, samples, numbers",
                   ("run", "storage")),
    "data info": Verb("data.info", "what a set of latent shards is",
                      ("storage",), (_URL,)),
    "data verify": Verb("data.verify", "reads all of a set of latent shards and checks every sample",
                        ("storage",), (_URL, _THREADS)),
    "data index": Verb("data.index", "a manifest for a WebDataset of latents that another tool made",
                       ("codec", "encode", "storage"), (_URL, _THREADS)),
    "data convert": Verb("data.convert", "latents of other projects -> shards, or shards -> a plain WebDataset",
                         ("codec", "encode", "storage"), _CONVERT),
    "bench data": Verb("bench.data", "rows/s of the stream, beside other readers of the same shards",
                       ("model", "data", "storage"), _BENCH_DATA),
    "bench evaluate": Verb("bench.evaluate", "images/s of an evaluation, beside torch-fidelity's feature pass",
                           ("evaluate", "resources"), _BENCH_EVALUATE),
    "bench encode": Verb("bench.encoding", "images/s of the autoencoder by precision, layout and compilation",
                         ("model", "codec", "encode", "storage", "resources"), _BENCH_ENCODE),
    "bench sample": Verb("bench.sampling", "images/s of generation, by phases, beside the released way's",
                         ("run", "model", "codec", "sample", "evaluate", "storage", "resources"), _BENCH_SAMPLE),
    "bench train": Verb("bench.train", "images/s of training on one GPU: released, compiled, fused, and a DiT",
                        ("run", "model", "train", "resources"), _BENCH_NETWORK),
    "bench scaling": Verb("bench.scaling", "training's rate by number of workers and ZeRO stage, on a cluster",
                          ("run", "model", "train", "resources"), _BENCH_SCALING),
    "bench forward": Verb("bench.forward", "the same of the network's forward pass alone",
                          ("run", "model", "resources"), _BENCH_NETWORK),
    "bench kernels": Verb("bench.kernels", "each Triton kernel beside the time that its bytes take, on one GPU",
                          ("model", "resources"), _BENCH_KERNELS),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse with the project's errors: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        _fail(message)


def _fail(message: str) -> NoReturn:
    print(f"dico-ray: {message}", file=sys.stderr)
    raise SystemExit(2)


def _verb_parser(verb: str) -> argparse.ArgumentParser:
    _, summary, sections, options = VERBS[verb]
    parser = _Parser(
        prog=f"dico-ray {verb}",
        description=summary,
        epilog="Settings are taken in this order, later ones win: defaults, --recipe, --config, command line. "
        "The settings of the other verbs are accepted too: one config describes the whole of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"start from a named run: {', '.join(RECIPES)}")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings, `section: {setting: value}`")
    parser.add_argument("--verbose", action="store_true", help="show the log lines of Ray and the libraries")
    for option in options:
        text = option.doc if option.default is None else f"{option.doc} [{_show(option.default)}]"
        keep: dict[str, Any] = {} if option.default is None else {"default": option.default}
        if option.default is None and option.name.startswith("--"):
            keep["required"] = True
        parser.add_argument(option.name, type=option.kind, nargs=option.values, help=text, **keep)
    for section in (*sections, *(name for name in SECTION_NAMES if name not in sections)):
        shown = section in sections
        group = parser.add_argument_group(section) if shown else parser
        for field in fields(section):
            text = f"{field.doc} [{_show(field.default)}]" if shown else argparse.SUPPRESS
            group.add_argument(f"--{field.path}", metavar=_metavar(field.annotation), help=text.replace("%", "%%"))
    return parser


def _show(default: Any) -> str:
    return "unset" if default in (None, "", ()) else str(default)


def _metavar(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if "Literal" in text:
        return "{" + text[text.index("[") + 1 : text.rindex("]")].replace("'", "").replace(" ", "") + "}"
    if "tuple" in text.lower():
        return "[A,B,...]"
    if "dict" in text:
        return "{A: 1, ...}"
    return next((kind.upper() for kind in ("int", "float", "bool") if kind in text), "TEXT")


def parse(verb: str, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """A verb's command line -> (config, the other arguments of its door).

    Raises ConfigError (one line) for what cannot work.
    """
    parser = _verb_parser(verb)
    known, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            raise ConfigError(f"--{name} is not a setting{nearest(name)}")
        raise ConfigError(f"{word!r} stands alone; write settings as --section.setting value")
    overrides: dict[str, Any] = {}
    for field in (field for section in SECTION_NAMES for field in fields(section)):
        text = vars(known)[field.path]
        if text is not None:
            section, name = field.path.split(".")
            overrides.setdefault(section, {})[name] = _value(field, text)
    own = {option.name.strip("-"): getattr(known, option.name.strip("-")) for option in VERBS[verb].options}
    return resolve(known.recipe, known.config, overrides), {"verbose": known.verbose, **own}


def _value(field: Setting, text: str) -> Any:
    """Command-line text -> the value to validate: lists as YAML, null where it can be unset, all else as it stands."""
    kind = str(field.annotation)
    if text in ("null", "none", "None") and "None" in kind:
        return None
    if "tuple" not in kind and "dict" not in kind:
        return text
    try:
        return yaml.safe_load(text.replace("(", "[").replace(")", "]"))
    except yaml.YAMLError:
        shown = "" if field.path == "storage.options" else f" {text}"  # keys may stand in it
        raise ConfigError(f"--{field.path}{shown}: write a list as [1,2], named values as {{a: 1}}") from None


def main(arguments: list[str] | None = None) -> int:
    """The command `dico-ray`. Exit code 0: done; 1: the work failed; 2: a setting is wrong."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print("usage: dico-ray VERB [--recipe NAME] [--config FILE] [--section.setting VALUE ...]\n")
        print("\n".join(f"  {name:16}{verb.summary}" for name, verb in VERBS.items()))
        print("\n`dico-ray VERB --help` explains the verb's settings.")
        return 0 if words else 2
    length = 2 if " ".join(words[:2]) in VERBS else 1
    verb = " ".join(words[:length])
    if verb not in VERBS:
        _fail(f"{verb!r} is not a verb; take one of {', '.join(VERBS)}")
    try:
        config, own = parse(verb, words[length:])
        if warning := job.check(verb, config, words[length:]):
            print(f"{verb}: {warning}", flush=True)
        storage.configure(config.storage)
        module, _, function = VERBS[verb].module.partition(":")
        getattr(importlib.import_module(f"dico_ray.{module}"), function or "main")(config, **own)
    except ConfigError as error:
        _fail(str(error))
    except UserError as error:
        print(f"dico-ray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dico-ray: interrupted; the same command continues from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
