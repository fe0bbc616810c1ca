"""The Inception network of the FID (arXiv 1706.08500): torch-fidelity's port of the TensorFlow graph ADM uses.

Its weights come from a file, a URL or torch hub's cache; none ships with this package.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash
from torch import Tensor, nn

from dico_ray.config import ConfigError
from dico_ray.metrics.features import Features
from dico_ray.storage import Storage

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
PUBLISHED = "Inception-v3 of the FID"
_SHA256 = "6726825d"  # how the published file's begins
_SPATIAL_CHANNELS = 7
_TIMEOUT_S = 30.0


class Inception(nn.Module):
    """uint8 pixels [0, 255] (B, 3, H, W) -> `Features`: pool (B, 2048), spatial (B, 2023), logits (B, 1008).

    pool: the last average pool, for FID, precision and recall. spatial: the first 7 channels of what TensorFlow
    calls mixed_6 (Mixed_6d here), 17 x 17, flattened with the channel running fastest, for sFID (arXiv 2103.03841)
    as ADM's evaluator takes it. logits: without the bias, as it takes them for the inception score.
    """

    image_size: int | None = None
    is_inception = True

    def __init__(self, weights: Mapping[str, Tensor], name: str = "Inception-v3") -> None:
        """weights: tensors by torch-fidelity's names. Raises ConfigError if they do not fit, or without the package."""
        super().__init__()
        self.network = _torch_fidelity(weights)
        self.name, self.hash = name, weights_hash(self.network)
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.register_forward_hook(self._tap)

    def _tap(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS]

    def forward(self, pixels: Tensor) -> Features:
        pool, logits = self.network(pixels)
        spatial = self._spatial
        assert spatial is not None
        self._spatial = None
        return Features(pool, spatial.permute(0, 2, 3, 1).flatten(1), logits)


def weights_hash(network: nn.Module) -> str:
    """xxh3-128 of names and values of all tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def _torch_fidelity(weights: Mapping[str, Tensor]) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ConfigError(
            "evaluate.features: Inception's network comes from torch-fidelity, which is not installed; "
            "pip install 'dico-ray[evaluate]'"
        ) from None
    buffer = io.BytesIO()  # its constructor would unpickle a file without restriction: it gets our own tensors
    torch.save(dict(weights), buffer)
    buffer.seek(0)
    names: Any = ["2048", "logits_unbiased"]
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=buffer)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ConfigError(
            f"evaluate.features: the tensors are not those of torch-fidelity's Inception "
            f"({' '.join(str(error).split())[:160]}); take {FILE}"
        ) from None


def published(path: Path) -> bool:
    """Whether a file is the published weights, byte for byte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(_SHA256)


def find_weights(where: str) -> Path:
    """`inception` (torch hub's cache, filled on first use), a URL, or a path -> a file on this machine.

    Raises ConfigError, with the place where to put the file, if there is none and none can be fetched.
    """
    url = URL if where == "inception" else where
    if "://" not in url:
        if not Path(url).is_file():
            raise ConfigError(f"evaluate.features: {url} is no file; put {FILE} there (from {URL})")
        return Path(url)
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not target.is_file():
        _fetch(url, target)
    return target


def _open(url: str) -> Any:
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    folder, _, name = url.rpartition("/")
    return Storage(folder).file(name)


def _fetch(url: str, target: Path) -> None:
    part = target.with_name(f"{target.name}.{uuid4().hex[:8]}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _open(url) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
        if url == URL and not published(part):
            raise ConfigError(f"evaluate.features: what {url} sent is not the published file; fetch it again")
        os.replace(part, target)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"evaluate.features: the Inception network is not here and cannot be fetched ({reason}): put {FILE}, "
            f"from {URL}, at {target}, or name it by evaluate.features"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A file of tensors by name. Raises ConfigError for one that is damaged, or asks for code to be run."""
    try:
        found = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise ConfigError(
            f"evaluate.features: {path} is damaged, or no file of tensors alone; fetch {URL} again"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"evaluate.features: {path} does not hold tensors by name; take {URL}")
    return found
