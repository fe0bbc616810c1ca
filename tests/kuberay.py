"""What tests of manifests share: KubeRay's schemas, and configs to render."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest

from dico_ray.config import Config
from dico_ray.operate import kuberay_schemas
from dico_ray.recipes import RECIPES
from dico_ray.settings import build, merge


def schema_folder() -> str:
    """The folder with KubeRay's CRD files, which are not part of this project: KUBERAY_CRDS names it."""
    folder = os.environ.get("KUBERAY_CRDS", "")
    if not folder:
        message = "KUBERAY_CRDS names no folder with KubeRay's CRD files"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@cache
def schema_of(kind: str) -> dict[str, Any]:
    """KubeRay's schema of a kind, read once."""
    return kuberay_schemas.load(kind, schema_folder())


def config_for(recipe: str = "dico-b-256", **sections: dict[str, Any]) -> Config:
    """A config that can be rendered: data and runs in a bucket, an image, and what `sections` change."""
    base: dict[str, Any] = {
        "run": {"name": "trial", "storage": "s3://bucket/runs"},
        "data": {"latents": "s3://bucket/latents"},
        "evaluate": {"reference": "s3://bucket/images", "features": "s3://bucket/features.safetensors"},
        "cluster": {"image": "registry.example.com/dico-ray:0.1.0"},
    }
    return build(merge(merge(RECIPES[recipe], {"recipe": recipe}), merge(base, sections)))


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one document of a kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found
