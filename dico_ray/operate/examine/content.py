"""Whether the data set is what its manifest says, fits the model, and a checkpoint comes back as it was written."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import numpy as np

from dico_ray.config import Config, UserError
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.operate.examine.findings import Finding, good
from dico_ray.operate.examine.store import PROBES
from dico_ray.storage import Storage
from dico_ray.train import check_fits, check_resumes

_CHECKPOINT_FLOATS = 1_000_000


def _examined(check: str, look: Callable[[], str], mend: str) -> Finding:
    try:
        return good(check, "", look())
    except (UserError, OSError) as error:
        return Finding(check, "", "bad", str(error), mend)


def data_set(config: Config, chunks: int) -> list[Finding]:
    """Reads so many chunks, spread over the data set, and checks every byte's hash."""

    def sample() -> str:
        storage = Storage(config.data.latents)
        manifest = Manifest.load(storage)
        total = len(manifest.chunk_sizes)
        picked = np.unique(np.linspace(0, total - 1, min(chunks, total)).round().astype(int)).tolist()
        rows = sum(len(read_chunks(storage, manifest, [chunk]).labels) for chunk in picked)
        return f"{rows} samples in {len(picked)} of {total} chunks are what the manifest says"

    def fits() -> str:
        manifest = Manifest.load(Storage(config.data.latents))
        check_fits(config, manifest)
        last = check_resumes(config, manifest)
        return f"model and data set fit; the run {f'continues after step {last.step}' if last else 'is new'}"

    return [
        _examined("data set: sample", sample, "see `dico-ray data verify`; restore the shard or encode again"),
        _examined("settings", fits, "change the setting that is named"),
    ]


def checkpoint(config: Config) -> Finding:
    """Writes a small checkpoint by training's own code, reads it back, compares, and removes it."""

    def there_and_back() -> str:
        import torch

        from dico_ray.training.checkpoint import Checkpoint, write_whole

        folder = Storage(config.run.storage).at(PROBES)
        name = f"checkpoint-{uuid4().hex}"
        weights = {"probe": torch.arange(_CHECKPOINT_FLOATS, dtype=torch.float32)}
        try:
            written = write_whole(folder.at(name), 1, {"weight": weights, "ema": weights}, {})
            back = Checkpoint.open(written.storage)
            for kind in ("weight", "ema"):
                if not torch.equal(back.tensors(kind)["probe"], weights["probe"]):
                    raise UserError(f"{written.storage.url}: other numbers came back than were written")
        finally:
            folder.remove(name)
        return f"{8 * _CHECKPOINT_FLOATS / 1e6:g} MB written, committed, read back, the same"

    return _examined("checkpoint", there_and_back, "see what run.storage allows and whether it has room")
