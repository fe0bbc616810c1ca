"""Settings as people write them -> Config: YAML, the command line's names, one-line errors, help texts."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from dico_ray import config
from dico_ray.config import Config, ConfigError, Section

SECTION_NAMES = tuple(name for name in Config.model_fields if name != "recipe")


class Setting(NamedTuple):
    """One leaf of the config tree, for the command line's help and the name checks."""

    path: str
    default: Any
    annotation: Any
    doc: str


def fields(section: str) -> list[Setting]:
    """The settings of one section, with the text that stands under each."""
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, Section)
    docs = _field_docs()[model.__name__]
    return [
        Setting(f"{section}.{name}", info.default, info.annotation, docs[name])
        for name, info in model.model_fields.items()
    ]


def _field_docs() -> dict[str, dict[str, str]]:
    """The string below each field, by class and field (Python keeps no such docstring at run time)."""
    docs: dict[str, dict[str, str]] = {}
    sources = sorted(Path(config.__file__).parent.glob("*.py"))
    for node in (node for file in sources for node in ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef):
            texts = docs.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
                    texts[field.target.id] = str(text.value.value)
    return docs


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings `over` laid on `base`; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def build(settings: dict[str, Any]) -> Config:
    """Nested settings -> Config.

    Raises ConfigError, one line, for an unknown key, a wrong value or settings that contradict each other.
    """
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path} is not a setting{nearest(path)}"
    if first["type"] == "value_error":
        return str(first.get("ctx", {}).get("error", first["msg"]))
    message = first["msg"][0].lower() + first["msg"][1:]
    # Keys may stand in the options, and what is printed ends up in logs.
    value = "" if path.startswith("storage.options") else f"{first['input']!r}: "
    return f"{path}: {value}{message}; change {path}"


def nearest(path: str) -> str:
    """`; did you mean X?` for a setting's name that does not exist, or an empty string."""
    known = [*SECTION_NAMES, *(field.path for section in SECTION_NAMES for field in fields(section))]
    close = difflib.get_close_matches(path, known, n=1) or difflib.get_close_matches(
        path.split(".")[-1], [name.split(".")[-1] for name in known], n=1
    )
    if not close:
        return "; see `dico-ray VERB --help` for the settings of a verb"
    name = close[0] if close[0] in known else next(k for k in known if k.endswith("." + close[0]))
    return f"; did you mean {name}?"


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file's settings. Raises ConfigError for a missing file, bad YAML, or no mapping at the top."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; name a YAML file that exists") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: must hold `section: {{setting: value}}`, not {settings!r}")
    return settings
