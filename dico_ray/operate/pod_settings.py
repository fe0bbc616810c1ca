"""A run's settings as its pods read them: what differs from the recipe, and nothing that a pod cannot reach."""

from __future__ import annotations

import re
from typing import Any

from dico_ray.config import Config, ConfigError
from dico_ray.recipes import RECIPES
from dico_ray.settings import build

_ELSEWHERE = ("cluster", "recipe")
_NODE_LOCAL = {"data.cache": ("/dev/shm/", "/scratch/", "/tmp/")}
LOGIN_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def kubernetes_name(config: Config, longest: int) -> str:
    """run.name as a name that Kubernetes takes (DNS-1035), dots and capitals replaced.

    Raises ConfigError if it does not begin with a letter, ends in no letter or digit, or is longer than `longest`.
    """
    name = re.sub(r"[._]", "-", config.run.name.lower())
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(f"run.name: {config.run.name}: a name in Kubernetes begins with a letter and ends in no sign")
    if len(name) > longest:
        raise ConfigError(f"run.name: {config.run.name} has {len(name)} characters; KubeRay takes {longest} here")
    return name


def settings_for_pods(config: Config) -> dict[str, Any]:
    """The config file of the pods, which resolves to the same run there. Holds no credentials.

    Raises ConfigError for a folder of this machine, which a pod does not have, and for credentials in the settings.
    """
    if config.storage.options:
        raise ConfigError(
            "storage.options holds credentials, and manifests hold none; put them, as AWS_... variables, into the "
            "secret that cluster.credentials_secret names"
        )
    found = _differences(config)
    for path in ("run.storage", "data.latents"):
        section, name = path.split(".")
        _check_reachable(config, path, getattr(getattr(config, section), name))
    for section, settings in found.items():
        for name, value in settings.items():
            for text in (value,) if isinstance(value, str) else ():
                _check_reachable(config, f"{section}.{name}", text)
                if LOGIN_IN_URL.search(text):
                    raise ConfigError(f"{section}.{name}: the URL holds a login, and manifests hold none; use a secret")
    return ({"recipe": config.recipe} if config.recipe else {}) | found


def _differences(config: Config) -> dict[str, dict[str, Any]]:
    """Section -> setting -> value, where it is not the recipe's."""
    own, base = (
        c.model_dump(mode="json", exclude=set(_ELSEWHERE)) for c in (config, build(RECIPES.get(config.recipe, {})))
    )
    found = {
        section: {name: value for name, value in settings.items() if value != base[section][name]}
        for section, settings in own.items()
    }
    return {section: settings for section, settings in found.items() if settings}


def _check_reachable(config: Config, path: str, location: str) -> None:
    cluster = config.cluster
    volume = (f"{cluster.storage_path.rstrip('/')}/",) if cluster.storage_claim else ()
    if location.startswith("/") and not f"{location}/".startswith((*volume, *_NODE_LOCAL.get(path, ()))):
        where = f"a folder in {volume[0]}" if volume else "set cluster.storage_claim for a volume"
        raise ConfigError(f"{path}: {location} is a folder of this machine, not of the pods; take a URL, or {where}")
