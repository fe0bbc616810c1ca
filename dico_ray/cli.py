"""`dico-ray VERB`: settings from a recipe, a YAML file and the command line, then the verb's door.

Nothing heavy is imported until the settings have been found good: help and a mistyped key answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, NoReturn

import yaml

from dico_ray.config import Config, ConfigError, UserError
from dico_ray.recipes import RECIPES, resolve
from dico_ray.settings import SECTION_NAMES, Setting, fields, nearest

#         verb:      (module,                  what it does,                            the sections it reads)
VERBS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "encode": ("dico_ray.encode", "a folder of images -> latent shards",
               ("codec", "data", "encode", "resources")),
    "train": ("dico_ray.train", "latent shards -> checkpoints with EMA weights (the same command resumes)",
              ("run", "model", "data", "train", "resources")),
    "sample": ("dico_ray.sample", "a checkpoint -> images, on a pool of actors",
               ("run", "codec", "sample", "resources")),
    "evaluate": ("dico_ray.evaluate", "images -> Frechet distance to a reference, on a pool of actors",
                 ("run", "evaluate", "resources")),
    "plan": ("dico_ray.operate.plan", "parameters, memory by ZeRO stage and shard bytes, before anything starts",
             ("run", "model", "data", "train")),
    "report": ("dico_ray.operate.report", "a run -> one HTML file: loss, samples, numbers",
               ("run",)),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse with the project's errors: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        _fail(message)


def _fail(message: str) -> NoReturn:
    print(f"dico-ray: {message}", file=sys.stderr)
    raise SystemExit(2)


def _verb_parser(verb: str) -> argparse.ArgumentParser:
    _, summary, sections = VERBS[verb]
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
    for section in (*sections, *(name for name in SECTION_NAMES if name not in sections)):
        shown = section in sections
        group = parser.add_argument_group(section) if shown else parser
        for field in fields(section):
            text = f"{field.doc} [{_show(field.default)}]" if shown else argparse.SUPPRESS
            group.add_argument(f"--{field.path}", metavar=_metavar(field.annotation), help=text.replace("%", "%%"))
    return parser


def _show(default: Any) -> str:
    return "unset" if default in (None, "") else str(default)


def _metavar(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if "Literal" in text:
        return "{" + text[text.index("[") + 1 : text.rindex("]")].replace("'", "").replace(" ", "") + "}"
    if "tuple" in text.lower():
        return "[A,B,...]"
    return next((kind.upper() for kind in ("int", "float", "bool") if kind in text), "TEXT")


def parse(verb: str, arguments: list[str]) -> tuple[Config, bool]:
    """A verb's command line -> (config, verbose). Raises ConfigError (one line) for what cannot work."""
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
    return resolve(known.recipe, known.config, overrides), known.verbose


def _value(field: Setting, text: str) -> Any:
    """Command-line text -> the value to validate: lists as YAML, null where it can be unset, all else as it stands."""
    kind = str(field.annotation)
    if text in ("null", "none", "None") and "None" in kind:
        return None
    if "tuple" not in kind:
        return text
    try:
        return yaml.safe_load(text.replace("(", "[").replace(")", "]"))
    except yaml.YAMLError:
        raise ConfigError(f"--{field.path} {text}: write a list as [1,2]") from None


def main(arguments: list[str] | None = None) -> int:
    """The command `dico-ray`. Exit code 0: done; 1: the work failed; 2: a setting is wrong."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print("usage: dico-ray VERB [--recipe NAME] [--config FILE] [--section.setting VALUE ...]\n")
        print("\n".join(f"  {verb:10}{summary}" for verb, (_, summary, _) in VERBS.items()))
        print("\n`dico-ray VERB --help` explains the verb's settings.")
        return 0 if words else 2
    if words[0] not in VERBS:
        _fail(f"{words[0]!r} is not a verb; take one of {', '.join(VERBS)}")
    try:
        config, verbose = parse(words[0], words[1:])
        importlib.import_module(VERBS[words[0]][0]).main(config, verbose=verbose)
    except ConfigError as error:
        _fail(str(error))
    except UserError as error:
        print(f"dico-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dico-ray: interrupted; the same command continues from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
